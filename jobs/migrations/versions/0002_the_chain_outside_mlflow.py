"""What a model and its bento were made from, kept where the model registry cannot change it."""

import sqlalchemy as sa
from alembic import op

from jobs.database import UTCDateTime

revision = "0002"
down_revision = "0001"

_OF_BENTOS = ("onnx_sha256", "model_sha256", "code_digest")


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("model_sha256", sa.String(length=64), nullable=False),
        sa.Column("artifacts", sa.Text(), nullable=False),
        sa.Column("data_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("settings_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("trained_as_of", sa.Date(), nullable=False),
        sa.Column("trained_on", sa.Text(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("gate", sa.String(length=8), nullable=False),
        sa.Column("recorded_by", sa.Text(), nullable=False),
        sa.Column("recorded_at", UTCDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )
    for name in _OF_BENTOS:
        op.add_column("bentos", sa.Column(name, sa.String(length=64), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("bentos", schema=None) as batch_op:
        for name in reversed(_OF_BENTOS):
            batch_op.drop_column(name)
    op.drop_table("models")
