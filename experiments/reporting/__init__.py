"""Results as CSV files, tables, figures and pages."""
