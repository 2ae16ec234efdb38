__version__ = "0.1.0"


def __getattr__(name):
    "`kdoct.Predictor`, so that `import kdoct` waits for nothing."
    if name == 'Predictor':
        from kdoct.predict import Predictor
        return Predictor
    raise AttributeError(f"module 'kdoct' has no attribute '{name}'")
