"""Alembic's entry point; the URL comes from `jobs.database.upgrade`."""

from alembic import context
from sqlalchemy import create_engine

from jobs.database import metadata

url = context.config.attributes["url"]
with create_engine(url).connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
