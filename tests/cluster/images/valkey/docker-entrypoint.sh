#!/bin/sh
# What the official image does: options alone mean valkey-server; root becomes user valkey; no protected mode.
set -e

case ${1:-} in -* | *.conf) set -- valkey-server "$@" ;; esac
if [ "$1" = valkey-server ] && [ "$(id -u)" = 0 ]; then
  find . \! -user valkey -exec chown valkey:valkey {} +
  exec setpriv --reuid valkey --regid valkey --clear-groups "$0" "$@"
fi
[ "$(umask)" != 0022 ] || umask 0077
if [ "$1" = valkey-server ]; then
  shift
  # Debian's default is on, the official image's is off. A configuration file has to come first; what follows wins.
  case ${1:-} in
    *.conf) file=$1; shift; set -- "$file" --protected-mode no "$@" ;;
    *) set -- --protected-mode no "$@" ;;
  esac
  # shellcheck disable=SC2086  # arguments
  set -- valkey-server "$@" $VALKEY_EXTRA_FLAGS
fi
exec "$@"
