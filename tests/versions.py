"""Print the versions that a test run is made with: `python -m tests.versions`."""

import importlib.metadata
import platform

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pytest")


def installed() -> dict[str, str]:
    """Version of Python and of each package by name; "not installed" for a package that is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    print(", ".join(f"{name} {version}" for name, version in installed().items()))
