"""What tests look for in a job's folder, a recipe of a picture in it, and a disk that is full."""

import errno
import hashlib
import json
import tarfile

from sdjax.pipeline.recipe import Recipe

RECIPE = Recipe(
    task="inpaint",
    prompt="a red heart, 日本 😀\nsecond line",
    negative_prompt="blurry",
    model="models/sd15.ckpt",
    seed=7,
    steps=20,
    guidance=7.5,
    guidance_rescale=0.0,
    guidance_interval=(0.0, 1.0),
    sampler="dpmpp_2m",
    spacing="karras",
    eta=None,
    clip_skip=1,
    width=64,
    height=48,
    dtype="float32",
    strength=0.8,
    noise="jax",
    image=("photo.jpg", "ab"),
    mask=("mask.png", "cd"),
)


def check_whole(out, count):
    """Every picture is there exactly once, and is the one that its line in a manifest says."""
    entries = [json.loads(line) for path in out.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(entry["picture"] for entry in entries) == list(range(count))
    assert len({entry["id"] for entry in entries}) == count
    files = {}
    for path in out.iterdir():
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".png"):
                        assert member.name not in files
                        files[member.name] = tar.extractfile(member).read()
        elif path.suffix == ".png":
            files[path.name] = path.read_bytes()
    assert len(files) == count
    for entry in entries:
        assert hashlib.sha256(files[f"{entry['id']}.png"]).hexdigest() == entry["sha256"]
    assert not [path.name for path in out.iterdir() if "partial" in path.name]


class Full:
    """A file on a disk that is full after half of what is written next."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
