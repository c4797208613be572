"""The churn service, and how a bento of it is packaged from a model version."""
