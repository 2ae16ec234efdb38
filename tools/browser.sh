#!/usr/bin/env bash
# Install Debian's Chromium where there is none and we may: the tests in a real browser skip without it.
if command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then exit 0; fi
install() { apt-get install -y -qq chromium chromium-driver >/dev/null 2>&1; }
install || { apt-get update -qq >/dev/null 2>&1 && install; } || echo 'Chromium could not be installed: the tests in a browser will skip'
