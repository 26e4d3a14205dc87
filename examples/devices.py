"""Pictures over all devices of a machine: the same pictures as on one of them, and as many times faster.

    python examples/devices.py --model sd15 --count 32
    python examples/devices.py --model sd15 --count 32 --parallel pmap
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/devices.py --count 8

The last line simulates four devices on a CPU, which shows how it works, not how fast it is: they share its cores.
"""

import argparse

import jax

import sdjax
from sdjax.train.plots import sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes")
    parser.add_argument("--prompt", default="red heart")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parallel", choices=["jit", "pmap"], default="jit")
    parser.add_argument("--output", default="pictures.png")
    options = parser.parse_args()
    pipe = sdjax.load(options.model)

    # Parameters go whole to every device; a batch is split, and every device samples and decodes its own share.
    pipe = pipe.on(jax.local_devices(), parallel=options.parallel)
    print(f"{pipe.placement.data_parallel} x {jax.local_devices()[0].device_kind}")
    pictures = pipe.text_to_image(options.prompt, count=options.count, steps=options.steps)
    sheet(pictures, columns=4).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
