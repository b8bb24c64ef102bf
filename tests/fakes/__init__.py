"""Stand-ins for libraries that need a GPU: stricter than the real ones, and without one."""
