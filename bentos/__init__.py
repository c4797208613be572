"""Services, one folder each."""
