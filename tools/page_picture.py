"""A picture of a report's page, as headless Chromium shows it.

python -m tools.page_picture REPORT.html PICTURE.png [--width 1100] [--height 1500]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run"
# Virtual milliseconds for the charts.
PATIENCE = 20_000


def main() -> None:
    """Take the picture; ends with a line where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1500)
    chosen = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("there is no chromium or google-chrome on this machine")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS.split(), f"--user-data-dir={profile}"]
        command += [f"--window-size={chosen.width},{chosen.height}"]
        command += [f"--virtual-time-budget={PATIENCE}", f"--screenshot={chosen.picture}"]
        command += [chosen.page.resolve().as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
