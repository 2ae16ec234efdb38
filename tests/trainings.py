"Short trainings of a Learner of kdoct's own, and how they are broken off."
from fastai.callback.core import Callback


def fit(learn):
    "Train quietly for the epochs of the recipe."
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


class Stop(Callback):
    "Ends the training after some batches, as a crash would."
    order, run_valid = 100, False
    def __init__(self, after): self.left = after
    def after_batch(self):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt
