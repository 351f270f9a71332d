"""Reports: an HTML page for exploring components, and figures for notebooks."""
