"""Kernels started by make lab reload modules of the package when a saved chapter has rewritten them."""

c = get_config()  # noqa: F821  (given by IPython)
c.InteractiveShellApp.extensions = ["autoreload"]
c.InteractiveShellApp.exec_lines = ["%autoreload 2"]
