"""Speed side by side: plans x precisions x backends x batch sizes x models, against the original PyTorch code.

python benchmarks/compare.py measure bundles/mar-b-fp32 bundles/mar-b-int8 --plans mar,gtr,gtr-fast --original ../mar
python benchmarks/compare.py summary
python benchmarks/compare.py suite --original ../mar --threads 2   # everything that docs/performance.md shows

Every measured point is a line of the results file; points that are there already (same machine, versions, source and
bundle) are not measured again. The VAE decoder is left out on all sides.

``--mode whole`` times real generations; ``--mode calls`` times each shape of call that the plan consists of and adds up
(compare_calls.py). In both, the contenders take turns.
"""

from __future__ import annotations

from compare_cli import main

if __name__ == "__main__":
    main(prog_name="compare.py")
