"""What people look at: one HTML file on which components are explored, and figures for notebooks."""
