"""The services that are measured beside ours. Each takes POST /predict {"user_id": …} and says at GET /readyz that it is ready."""
