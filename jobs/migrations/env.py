"""Alembic's entry point; `jobs.database` hands it a connection in a transaction that nobody else migrates in."""

from alembic import context

from jobs.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
