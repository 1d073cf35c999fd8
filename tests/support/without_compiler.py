"""Runs a script like Python, but DeepSpeed compiles nothing: without_compiler.py SCRIPT FLAGS. For
processes of one machine gloo does what the compiled operation does."""

import runpy
import sys

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
