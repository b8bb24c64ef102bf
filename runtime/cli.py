"""gtr-run: makes pictures from a bundle. Needs neither PyTorch nor onnx; heavy imports wait until a command runs."""

from __future__ import annotations

import click

from .commands.bench import bench
from .commands.compare import compare
from .commands.console import CommandGroup
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.plan import show_plan


@click.group(cls=CommandGroup, name="gtr-run", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gtr-deploy")
def main() -> None:
    """Generate images from a bundle with the GtR two-stage sampler."""


for _command in (generate, show_plan, compare, bench, doctor, evaluate):
    main.add_command(_command)

if __name__ == "__main__":
    main()
