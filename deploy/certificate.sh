#!/usr/bin/env bash
# Creates this node's TLS certificate if RAY_USE_TLS is 1 and the CA's key exists; without the key, checks that the
# certificate exists. The certificate contains this machine's host name and addresses, and the given NAMEs.
#   certificate.sh [NAME ...]
set -euo pipefail
# shellcheck source=deploy/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
[ "$RAY_USE_TLS" = 1 ] || exit 0

if [ ! -r "$RLSYS_TLS_CA_KEY" ]; then
  for file in "$RAY_TLS_CA_CERT" "$RAY_TLS_SERVER_CERT" "$RAY_TLS_SERVER_KEY"; do
    [ -r "$file" ] || {
      echo "certificate.sh: RAY_USE_TLS=1, but $file does not exist: copy this node's certificate there, or the CA's key" \
        "to $RLSYS_TLS_CA_KEY to create the certificate" >&2
      exit 1
    }
  done
  exit 0
fi

read -ra addresses < <(hostname -I)

fits() { # whether the certificate is from this CA, is valid for another day and has every address of this machine
  local address
  openssl verify -CAfile "$RAY_TLS_CA_CERT" "$RAY_TLS_SERVER_CERT" >/dev/null 2>&1 || return 1
  openssl x509 -in "$RAY_TLS_SERVER_CERT" -noout -checkend 86400 >/dev/null || return 1
  for address in "${addresses[@]}"; do
    openssl x509 -in "$RAY_TLS_SERVER_CERT" -noout -checkip "$address" | grep -q "does match" || return 1
  done
}
if [ $# -eq 0 ] && fits; then exit 0; fi

names="DNS:localhost,DNS:$(hostname),IP:127.0.0.1"
for address in "${addresses[@]}"; do names+=",IP:$address"; done
for name in "$@"; do names+=",DNS:$name"; done

umask 077
folder=$(dirname "$RAY_TLS_SERVER_CERT")
mkdir -p "$folder"
making=$(mktemp -d "$folder/making.XXXXXX")
trap 'rm -rf "$making"' EXIT
quietly() { # prints the output only on failure: openssl also prints on success
  "$@" 2>"$making/said" || {
    cat "$making/said" >&2
    exit 1
  }
}
quietly openssl req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -keyout "$making/key" \
  -out "$making/request" -subj "/CN=$(hostname)" -addext "subjectAltName=$names"
quietly openssl x509 -req -in "$making/request" -CA "$RAY_TLS_CA_CERT" -CAkey "$RLSYS_TLS_CA_KEY" -days 365 \
  -set_serial "0x$(openssl rand -hex 16)" -copy_extensions copy -out "$making/certificate"
mv "$making/key" "$RAY_TLS_SERVER_KEY"
mv "$making/certificate" "$RAY_TLS_SERVER_CERT"
