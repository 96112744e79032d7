#!/bin/bash
# What pyarrow 26.0.1 makes of numpy 1.26, which servers whose Python backend reads strings wrongly with numpy 2 need.
#
# Guessed: pyarrow declares the numpy that it needs, so pip would refuse the pair, or say so in `pip check`.
# Seen: it declares none. pip installs both and `pip check` finds nothing broken, but `import pyarrow` raises ImportError
#   ("requires NumPy 2.0 or newer"), and with it whatever is built on it, Ray Data too. 25.0.1 imports.
#
# Exits 1 if that changes. Needs Python 3.11 or 3.12 with venv, and pip's index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(command -v python3.11 || command -v python3.12)
changed=0
for seen in "26.0.1 ImportError" "25.0.1 imports"; do
  version=${seen% *}
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "pyarrow==$version" numpy==1.26.4 2> "$folder/log"
  "$folder/$version/bin/pip" check > "$folder/check" || { echo "pip check with pyarrow $version: $(cat "$folder/check")"; changed=1; }
  found="$version imports"
  "$folder/$version/bin/python" -c 'import pyarrow' 2> "$folder/error" || found="$version $(sed -n '$s/:.*//p' "$folder/error")"
  echo "pyarrow $found beside numpy 1.26.4, by pip check: $(cat "$folder/check")"
  [ "$found" = "$seen" ] || changed=1
done
exit $changed
