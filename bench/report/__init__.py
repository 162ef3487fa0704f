"""Report: a record and its verdict as pages for people and files for machines."""
