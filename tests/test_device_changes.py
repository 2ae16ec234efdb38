"Views as other devices would take them: off by default, the same wherever they are made, and what each change does."
import pytest

from kdoct.core.presets import preset

# of recipes before there were changes of devices
KEYS = {
    "tiny": "3e836833710948c1",
    "paper-neh": "d31c07d0778ee9cf",
    "explainable-lc25000": "02a169a922bfeb2c",
}
NETWORKS = {
    "teacher": "02c3c1985311bdd3",
    "student": "3ae4f440b5439f37",
    "baseline": "2ceb1fdcd37cd932",
}


@pytest.mark.parametrize("name", KEYS)
def test_a_recipe_that_names_no_device_has_the_key_it_always_had(name):
    assert preset(name).key == KEYS[name]


def test_networks_that_know_of_no_device_have_the_keys_they_always_had():
    plain = preset("edge")
    assert {role: plain.network_key(role) for role in plain.roles} == NETWORKS
    changed = plain.override(**{"student.augment.device.prob": 0.5})
    assert {r for r in plain.roles if changed.network_key(r) != NETWORKS[r]} == {"student", "baseline"}
    clean = plain.override(**{"distill.teacher_view": "clean"})
    assert {r for r in plain.roles if clean.network_key(r) != NETWORKS[r]} == {"student"}


def test_a_further_student_changes_one_field_of_a_section_within_a_section():
    both = preset("edge").override(**{
        "student.augment.device.speckle": 0.1, "students.soft.augment.device.prob": 0.5,
    })
    device = both.training("student-soft").augment.device
    assert (device.prob, device.speckle) == (0.5, 0.1)
    assert both.training("student").augment.device.prob == 0
