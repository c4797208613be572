"""The jobs that keep the churn model alive: one module a job, then what they share."""
