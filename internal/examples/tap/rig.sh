#!/bin/bash
# rig.sh [MTU [SECONDS [FLAGS...]]]: what a Linux kernel gets through the tap example,
# without and with -vnet: iperf3 up, down, and four streams of each, and what arrives of
# 2 Gbit/s of UDP datagrams of 1,400 bytes, in Gbit/s.
#
# Run it as root from anywhere in the repository; it needs go, iperf3 and iproute2. The
# host and the guest are network namespaces of its own, which it removes at the end;
# nothing leaves them. FLAGS are more flags of the example. With PROFILE=DIR, CPU
# profiles of one stream up and down are written to DIR.
set -euo pipefail
cd "$(dirname "$0")"
mtu=${1:-1500} seconds=${2:-4}
shift $(($# < 2 ? $# : 2))

host=tap-host-$$ guest=tap-guest-$$ server=198.51.100.1 work=$(mktemp -d) pids=()
cleanup() {
	[ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
	ip netns del $host 2>/dev/null || true
	ip netns del $guest 2>/dev/null || true
	rm -rf "$work"
}
trap cleanup EXIT
go build -o "$work/tap" .

ip netns add $host
ip netns add $guest
ip -n $host link set lo up
ip -n $host addr add $server/32 dev lo
ip netns exec $host iperf3 -s -B $server >/dev/null 2>&1 &
pids+=($!)

# with FLAGS... -- COMMAND... runs a command beside the example, with the guest ready.
with() {
	local flags=() tap
	while [ "$1" != -- ]; do flags+=("$1"); shift; done
	shift
	coproc TAP { exec ip netns exec $host "$work/tap" -ns $guest -mtu "$mtu" "${flags[@]}" 2>&1; }
	tap=$TAP_PID
	pids+=("$tap")
	read -r ready <&"${TAP[0]}"
	[ "$ready" = ready ] || { echo "rig.sh: $ready" >&2; exit 1; }
	ip -n $guest link set tap0 mtu "$mtu" up
	ip -n $guest addr add 10.0.2.15/24 dev tap0
	ip -n $guest route add default via 10.0.2.2
	"$@"
	kill "$tap"
	wait "$tap" 2>/dev/null || true
}

# measure ARGS... prints the rate of one run of iperf3 in Gbit/s.
measure() {
	timeout $((seconds + 30)) ip netns exec $guest iperf3 -f g -c $server -t "$seconds" -O 1 "$@" |
		awk '/receiver/ && (/SUM/ || !many) { for (i = 2; i <= NF; i++) if ($i == "Gbits/sec") rate = $(i - 1); many = many || /SUM/ } END { printf " %8s", rate }'
}
udp=(-u -b 2G -l 1400)
all() { measure; measure -R; measure -P 4; measure -P 4 -R; measure "${udp[@]}"; measure "${udp[@]}" -R; echo; }

printf '%-8s %8s %8s %8s %8s %8s %8s   Gbit/s at MTU %s\n' tap up down up4 down4 udp-up udp-down "$mtu"
for vnet in -vnet=false -vnet; do
	printf '%-8s' "${vnet#-vnet=false}"
	with $vnet "$@" -- all
done
if [ -n "${PROFILE:-}" ]; then
	mkdir -p "$PROFILE"
	printf '%-8s' profiled
	with -vnet "$@" -cpuprofile "$PROFILE/up.prof" -- measure
	with -vnet "$@" -cpuprofile "$PROFILE/down.prof" -- measure -R
	echo
fi
