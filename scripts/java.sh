#!/bin/sh
# Says nothing if Spark finds a Java it can run on; installs one where apt-get and root are at hand; else one sentence.
set -eu

needed=17

# Spark's own order: JAVA_HOME, then PATH.
if [ -n "${JAVA_HOME:-}" ]; then java=$JAVA_HOME/bin/java; else java=java; fi

# Major version of $java, or 0: 'openjdk version "17.0.15"' is 17, 'java version "1.8.0_402"' is 8.
major() {
  if ! text=$("$java" -version 2>&1); then echo 0; return; fi
  found=$(printf '%s\n' "$text" | sed -n 's/.* version "\(1\.\)\{0,1\}\([0-9]*\).*/\2/p' | head -n 1)
  echo "${found:-0}"
}

# What is wrong, if anything is.
wrong() {
  found=$(major)
  if [ "$found" -ge "$needed" ]; then return; fi
  if [ "$found" -gt 0 ]; then
    echo "Spark 4 needs Java $needed or later, and ${JAVA_HOME:-the java on PATH} is Java $found"
  elif [ -n "${JAVA_HOME:-}" ]; then
    echo "Spark 4 needs Java $needed or later, and JAVA_HOME=$JAVA_HOME has no bin/java that runs"
  else
    echo "Spark 4 needs Java $needed or later, and there is no java on PATH"
  fi
}

problem=$(wrong)
if [ -z "$problem" ]; then exit 0; fi

if [ -z "${JAVA_HOME:-}" ] && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
  echo "$problem: installing it with apt-get." >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >&2 || true
  # A Debian or Ubuntu release has one or two of these.
  for version in 17 21 25; do
    if apt-get install -y -qq --no-install-recommends "openjdk-$version-jre-headless" >/dev/null 2>&1; then break; fi
  done
  problem=$(wrong)
  if [ -z "$problem" ]; then exit 0; fi
fi

sudo="sudo "
if [ "$(id -u)" -eq 0 ]; then sudo=; fi
if command -v apt-get >/dev/null; then
  install="${sudo}apt-get install openjdk-17-jre-headless"
elif command -v dnf >/dev/null; then
  install="${sudo}dnf install java-17-openjdk-headless"
elif command -v brew >/dev/null; then
  install="brew install openjdk@17"
else
  install="apt-get install openjdk-17-jre-headless, or your system's package of a Java $needed runtime"
fi
if [ -n "${JAVA_HOME:-}" ]; then
  echo "$problem: install one ($install) and point JAVA_HOME to it, or unset JAVA_HOME." >&2
else
  echo "$problem: install one ($install), or point JAVA_HOME to one." >&2
fi
exit 1
