#!/usr/bin/env bash
# K+1 hosts as network namespaces on one switch, every link limited in both directions by tbf.
#
#   netns.sh up K [RATE]        makes hosts 0..K at 10.77.0.1, .2, ...; prints the run's PREFIX
#   netns.sh hold K [RATE]      as `up`, then takes everything down when its stdin ends or it is killed
#   netns.sh exec PREFIX N CMD...   runs CMD on host N
#   netns.sh link-down PREFIX N     as a pulled cable
#   netns.sh link-up PREFIX N
#   netns.sh rate PREFIX N RATE     another limit for the link of host N, both ways
#   netns.sh down PREFIX
#
# RATE is tc's, 200mbit if not given. PREFIX is unique for each run, so that runs do not meet; the switch is in a
# namespace of its own (PREFIX-sw), so that neither the host's routes nor its firewall matter. Needs root.
set -euo pipefail

# One TCP flow reaches the rate if the burst covers a timer tick and a few segments; the queue holds LATENCY of
# bytes, which is enough for a window at 200 mbit and short enough that a flow that begins is not held up.
BURST=128kb
LATENCY=30ms

fail() { echo "netns.sh: $*" >&2; exit 1; }

need_root() {
  [ "$(id -u)" = 0 ] || fail "needs root: network namespaces and tc are the kernel's to give (try sudo)"
  for tool in ip tc; do
    command -v "$tool" >/dev/null || fail "needs \`$tool\` (package iproute2)"
  done
}

shape() { # NAMESPACE DEVICE RATE
  ip netns exec "$1" tc qdisc add dev "$2" root tbf rate "$3" burst "$BURST" latency "$LATENCY"
}

make_host() { # PREFIX N RATE
  local host="$1-$2" switch="$1-sw" port="p$2"
  ip netns add "$host"
  ip -n "$host" link add eth0 type veth peer name "$port" netns "$switch"
  ip -n "$switch" link set "$port" master br0 up
  ip -n "$host" addr add "10.77.0.$(($2 + 1))/24" dev eth0
  ip -n "$host" link set lo up
  ip -n "$host" link set eth0 up
  shape "$host" eth0 "$3"
  shape "$switch" "$port" "$3"
}

up() { # K RATE
  [[ "$1" =~ ^[0-9]+$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 200 ] || fail "K is 1 to 200, not \`$1\`"
  prefix="ab$$"
  trap 'down "$prefix"' EXIT
  ip netns add "$prefix-sw"
  # Frames are passed on at once: no other switch, no loops.
  ip -n "$prefix-sw" link add br0 type bridge stp_state 0 forward_delay 0
  ip -n "$prefix-sw" link set br0 up
  for n in $(seq 0 "$1"); do
    make_host "$prefix" "$n" "$2"
  done
}

down() { # PREFIX
  [ -n "$1" ] || return 0
  local name
  for name in $(ip netns list | cut -d' ' -f1); do
    case "$name" in
      "$1"-sw|"$1"-[0-9]*) ip netns del "$name" || true ;;
    esac
  done
}

switch_port() { # PREFIX N up|down
  ip -n "$1-sw" link set "p$2" "$3"
}

rate() { # PREFIX N RATE
  local limit="tbf rate $3 burst $BURST latency $LATENCY"
  # shellcheck disable=SC2086
  ip netns exec "$1-$2" tc qdisc change dev eth0 root $limit
  # shellcheck disable=SC2086
  ip netns exec "$1-sw" tc qdisc change dev "p$2" root $limit
}

usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 64; }

[ $# -ge 1 ] || usage
command="$1"
shift
case "$command" in
  up)
    [ $# -ge 1 ] || usage
    need_root
    up "$1" "${2:-200mbit}"
    trap - EXIT
    echo "$prefix"
    ;;
  hold)
    [ $# -ge 1 ] || usage
    need_root
    # Whoever holds our stdin decides, not the terminal: the nodes end first.
    trap '' INT
    trap 'exit 143' TERM HUP
    up "$1" "${2:-200mbit}"
    echo "$prefix"
    cat >/dev/null
    ;;
  exec)
    [ $# -ge 3 ] || usage
    need_root
    host="$1-$2"
    shift 2
    exec ip netns exec "$host" "$@"
    ;;
  link-down|link-up)
    [ $# -eq 2 ] || usage
    need_root
    switch_port "$1" "$2" "${command#link-}"
    ;;
  rate)
    [ $# -eq 3 ] || usage
    need_root
    rate "$1" "$2" "$3"
    ;;
  down)
    [ $# -eq 1 ] || usage
    need_root
    down "$1"
    ;;
  *) usage ;;
esac
