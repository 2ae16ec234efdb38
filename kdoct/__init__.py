import warnings

__version__ = "0.1.0"

# fastai 2 says so when it is imported beside torch 2.15; nobody who reads it here can do anything about it
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)


def __getattr__(name):
    "`kdoct.Predictor`, so that `import kdoct` waits for nothing."
    if name == 'Predictor':
        from kdoct.deploy.predict import Predictor
        return Predictor
    raise AttributeError(f"module 'kdoct' has no attribute '{name}'")
