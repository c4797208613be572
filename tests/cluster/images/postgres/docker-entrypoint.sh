#!/usr/bin/env bash
# What the official image does: on an empty PGDATA initdb, user, database and /docker-entrypoint-initdb.d; then postgres.
set -Eeuo pipefail

# VARIABLE, or the content of the file that VARIABLE_FILE names
from_file() {
  local file=${1}_FILE value
  [ -z "${!1:-}" ] || [ -z "${!file:-}" ] || { echo "both $1 and $file are set; expected one" >&2; exit 1; }
  value=${!1:-${2:-}}
  if [ -n "${!file:-}" ]; then value=$(<"${!file}"); fi
  export "$1=$value"
  unset "$file"
}

[ "${1:0:1}" != - ] || set -- postgres "$@"
[ "$1" = postgres ] || exec "$@"
for argument; do
  case $argument in -'?' | --help | --describe-config | -V | --version) exec "$@" ;; esac
done

if [ "$(id -u)" = 0 ]; then
  mkdir -p "$PGDATA" /var/run/postgresql
  chown -R postgres:postgres "$PGDATA" /var/run/postgresql
  exec setpriv --reuid postgres --regid postgres --init-groups "$0" "$@"
fi

if ! getent passwd "$(id -u)" >/dev/null; then  # any UID, as OpenShift gives
  NSS_WRAPPER_PASSWD=$(mktemp) NSS_WRAPPER_GROUP=$(mktemp) LD_PRELOAD=libnss_wrapper.so
  export NSS_WRAPPER_PASSWD NSS_WRAPPER_GROUP LD_PRELOAD
  echo "postgres:x:$(id -u):$(id -g):PostgreSQL:$PGDATA:/bin/false" >"$NSS_WRAPPER_PASSWD"
  echo "postgres:x:$(id -g):" >"$NSS_WRAPPER_GROUP"
fi

mkdir -p "$PGDATA"
chmod 0700 "$PGDATA" 2>/dev/null || true  # a volume of another owner: postgres says it better
from_file POSTGRES_PASSWORD
from_file POSTGRES_USER postgres
from_file POSTGRES_DB "$POSTGRES_USER"
from_file POSTGRES_INITDB_ARGS

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  if [ -z "$POSTGRES_PASSWORD" ] && [ "${POSTGRES_HOST_AUTH_METHOD:-}" != trust ]; then
    echo "Error: Database is uninitialized and superuser password is not specified: set POSTGRES_PASSWORD" >&2
    exit 1
  fi
  # shellcheck disable=SC2086  # arguments
  initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") $POSTGRES_INITDB_ARGS
  unset LD_PRELOAD
  method=${POSTGRES_HOST_AUTH_METHOD:-$(postgres -C password_encryption -D "$PGDATA" "${@:2}")}
  printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

  export PGPASSWORD=${PGPASSWORD:-$POSTGRES_PASSWORD} PGHOST= PGHOSTADDR=
  port=5432
  pg_ctl -D "$PGDATA" -o "${2:+$(printf '%q ' "${@:2}")}-c listen_addresses='' -p $port" -w start
  query() { psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc --username "$POSTGRES_USER" --port $port "$@"; }
  if [ -z "$(query --dbname postgres --tuples-only -v db="$POSTGRES_DB" <<<"SELECT 1 FROM pg_database WHERE datname = :'db'")" ]; then
    query --dbname postgres -v db="$POSTGRES_DB" <<<'CREATE DATABASE :"db"'
  fi
  psql=(psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc --username "$POSTGRES_USER" --port $port --dbname "$POSTGRES_DB")
  shopt -s nullglob
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh)
        echo "$0: running $file"
        if [ -x "$file" ]; then
          "$file"
        else
          # shellcheck disable=SC1090
          . "$file"
        fi
        ;;
      *.sql) echo "$0: running $file"; "${psql[@]}" --file "$file" ;;
      *.sql.gz) echo "$0: running $file"; gunzip -c "$file" | "${psql[@]}" ;;
      *) echo "$0: ignoring $file" ;;
    esac
  done
  pg_ctl -D "$PGDATA" -m fast -w stop
  unset PGPASSWORD PGHOST PGHOSTADDR
  printf '\nPostgreSQL init process complete; ready for start up.\n\n'
fi
exec "$@"
