"""A laboratory for the spectra of transformer weights. Submodules load when first used; importing this loads none of them."""
import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["checks", "dashboards", "data", "losses", "models", "runs", "spectra", "storage", "tasks", "theory", "training"],
    submod_attrs={
        "dashboards.dashboard": ["Dashboard"],
        "runs.recorder": ["SpectrumRecorder"],
        "runs.results": ["results"],
        "runs.store": ["Run", "list_runs"],
        "runs.sweep": ["sweep"],
        "spectra.analysis": ["analyze"],
        "spectra.checkpoints": ["from_checkpoints"],
        "spectra.history": ["SpectrumHistory"],
        "training.fit": ["fit"],
    },
)
