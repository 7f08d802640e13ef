#!/usr/bin/env bash
# Install the browser that the tests of the dashboard use: Debian's Chromium, where there is none. Needs root or sudo.
set -euo pipefail
browser=${UORA_TEST_BROWSER:-/usr/bin/chromium}
if [ -x "$browser" ]; then exit 0; fi

explain() {
  echo "No browser at $browser, and $1." >&2
  echo "Install Chromium, or name one that is there: UORA_TEST_BROWSER=/path/to/chrome make test." >&2
  exit 1
}
[ "$browser" = /usr/bin/chromium ] || explain "UORA_TEST_BROWSER names it"
command -v apt-get > /dev/null || explain "apt-get is not here to install one"
as_root=()
if [ "$(id -u)" != 0 ]; then
  command -v sudo > /dev/null || explain "neither root nor sudo is there to install one"
  as_root=(sudo)
fi
install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
}
echo "Installing Chromium for the tests of the dashboard." >&2
# A fresh machine has no list of packages yet.
install 2> /dev/null || { "${as_root[@]}" apt-get update -qq && install; } || explain "apt-get could not install one"
[ -x "$browser" ] || explain "the package chromium did not bring it"
