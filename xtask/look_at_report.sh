#!/usr/bin/env bash
# Opens target/report/index.html (or the page given) in headless Chromium, as wide as a desk and as a
# phone, on light and on dark: fails if the page is wider than the window, loads anything or reports an
# error, and leaves pictures in target/report/look to be looked at. Optional: needs Chromium.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

page=$(realpath "${1:-target/report/index.html}")
look=$(dirname "$page")/look
mkdir -p "$look"
for name in chromium chromium-browser google-chrome; do
  browser=$(command -v "$name") && break
done
[ -n "${browser:-}" ] || { echo "no Chromium: install it (Debian: apt-get install chromium)"; exit 2; }

headless() {
  "$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files \
    --virtual-time-budget=5000 "$@" 2>>"$look/browser.log"
}

# A page within a page, as wide as the window, that says how wide its contents are and what they load.
measure() {
  cat >"$look/frame.html" <<HTML
<body style="margin:0"><iframe id="page" src="file://$page" style="border:0;width:$1px;height:900px"></iframe>
<output id="measured"></output><script>
page.onload = () => {
  const inside = page.contentWindow, root = page.contentDocument.documentElement;
  const loaded = inside.performance.getEntriesByType('resource').length;
  measured.textContent = root.scrollWidth + ' ' + loaded;
};
</script></body>
HTML
  headless --dump-dom "file://$look/frame.html" | sed -n 's/.*<output id="measured">\([0-9 ]*\)<.*/\1/p'
}

: >"$look/browser.log"
failed=0
for width in 390 1200; do
  read -r contents loaded < <(measure "$width") || { echo "the page does not open"; exit 1; }
  echo "width $width: contents $contents wide, $loaded resources loaded"
  if [ "$contents" -gt "$width" ] || [ "$loaded" -ne 0 ]; then failed=1; fi
  for scheme in dark light; do
    [ "$scheme" = dark ] && setting=0 || setting=1
    headless --window-size="$width,6000" --blink-settings=preferredColorScheme="$setting" \
      --screenshot="$look/$width-$scheme.png" "file://$page" >/dev/null
  done
done
rm "$look/frame.html"
if grep -i 'uncaught\|CONSOLE.*error' "$look/browser.log"; then failed=1; fi
echo "pictures: $look"
exit "$failed"
