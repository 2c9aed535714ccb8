"""Print what a vLLM that is installed here needs besides torch and its companions, one requirement a line.

Not a pytest file: `make vllm` uses it. torchvision, torchaudio and torchcodec are built for one torch each, and vLLM
asks for them for pictures and sounds alone."""
import importlib.metadata
import sys

from packaging.requirements import Requirement


def needs(name):
    "Yield requirements as pip reads them, without what other platforms need."
    for r in map(Requirement, importlib.metadata.requires(name)):
        wanted = r.marker is None or r.marker.evaluate({"extra": ""})
        r.marker = None
        if wanted and not r.name.startswith("torch"): yield str(r)


if __name__ == "__main__": print(*needs(sys.argv[1]), sep="\n")
