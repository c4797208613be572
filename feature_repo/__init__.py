"""What Feast knows: columns, feature views and the feature service."""
