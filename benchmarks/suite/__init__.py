"""The parts of `tools/gpu_suite`: what each measures, the files it leaves, and how parts are stopped and resumed."""
