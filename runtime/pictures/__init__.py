"""What people look at: PNG files, contact sheets, traces."""
