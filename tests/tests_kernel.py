"""A Triton kernel in a real file: Triton reads the source of what it compiles."""

try:
    import triton.language as tl
except ImportError:  # macOS, Windows
    tl = None


def fill_one(pointer):
    """Store a one."""
    tl.store(pointer, 1.0)
