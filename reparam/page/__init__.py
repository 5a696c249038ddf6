"""The report page: a compilation as one HTML file."""
