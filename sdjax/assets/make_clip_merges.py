"""Makes clip_merges.txt.gz, the byte-pair merges of OpenAI's CLIP tokenizer, from a PyPI wheel.

pip download --no-deps clip-anytorch==2.6.0
python sdjax/assets/make_clip_merges.py clip_anytorch-2.6.0-py3-none-any.whl

The wheel (open_clip_torch's too) holds OpenAI's file; only its merges 1 to 48894 are in use. One merge a
line, two symbols with a space between, in order of rank. Licence: CLIP_MERGES_LICENSE.
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

NAME = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 49152 - 256 - 2


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(NAME)]
        packed = archive.read(member)
    if (digest := hashlib.sha256(packed).hexdigest()) != SHA256:
        raise SystemExit(f"{member} in {wheel} has sha256 {digest}, expected {SHA256}")
    merges = gzip.decompress(packed).decode().split("\n")[1 : MERGES + 1]
    target = Path(__file__).with_name("clip_merges.txt.gz")
    target.write_bytes(gzip.compress("\n".join(merges).encode(), 9, mtime=0))
    print(f"{target}: {len(merges)} merges, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
