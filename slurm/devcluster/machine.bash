# What `up` and `down` share: the names of things on this machine, and how its processes are told from others.

readonly NETWORK=10.87.0             # /24; the login host is .1, node N is .(10 + N)
readonly BRIDGE=msdev0               # the switch; node N hangs on it by msdevN
readonly RECORD=/run/mimscale-devcluster # what the one cluster of this machine consists of, even if its directory is deleted
readonly PIDS=$RECORD/pids           # one file a daemon: process id and start
readonly HOSTS_TAG='# mimscale devcluster'

say() { echo "devcluster: $*" >&2; }
fail() { say "$@"; exit 1; }

need_root() {
  [ "$(id -u)" = 0 ] || fail "needs root, for network namespaces and daemons; run it with sudo"
}

# One `up` or `down` at a time. Daemons must not inherit the descriptor, or they would hold the lock for ever.
take_turn() {
  exec 9>"$RECORD.lock"
  flock --wait 60 9 || fail "another up or down is at work on this machine; wait for it"
}

# Clock ticks since boot at which a living process started: tells it from a later one with the same id.
start_ticks() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  set -- ${stat##*) } # after the name, which may hold spaces: state, parent ...
  [ "$1" != Z ] && echo "${20}"
}

# Is the process alive whose id and start stand in a pid file?
is_alive() {
  local pid ticks
  { read -r pid ticks <"$1"; } 2>/dev/null && [ "$(start_ticks "$pid")" = "$ticks" ]
}

# End the process of a pid file: by TERM, and by KILL when that takes too long.
stop() {
  local pid left
  is_alive "$1" || return 0
  read -r pid _ <"$1"
  kill -TERM "$pid"
  for ((left = 100; left > 0; left--)); do
    is_alive "$1" || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

nodes_of_machine() { ip netns list | sed -nE 's/^(msdev[0-9]+).*/\1/p'; }
links_of_machine() { ip -brief link show | sed -nE 's/^(msdev[0-9]+).*/\1/p'; }

# Remove all that `up` made on this machine except the state directory, which holds the logs.
take_down() {
  local node name link
  rm -f "$RECORD/ready"
  for name in slurmctld slurmdbd mariadbd; do stop "$PIDS/$name"; done
  for name in "$PIDS"/*; do stop "$name"; done
  for node in $(nodes_of_machine); do
    ip netns pids "$node" | xargs -r kill -KILL 2>/dev/null || true # jobs that outlived their slurmd
    ip netns delete "$node"
  done
  # Each by itself: a node's link would go with its namespace, but only when the last process in it has gone.
  for link in $(links_of_machine); do ip link delete "$link" 2>/dev/null || true; done
  if grep -q "$HOSTS_TAG" /etc/hosts; then
    # Written in place: in a container /etc/hosts is a mount, which cannot be replaced.
    grep -v "$HOSTS_TAG" /etc/hosts >"/run/hosts.$$" || true
    cat "/run/hosts.$$" >/etc/hosts
    rm "/run/hosts.$$"
  fi
  rm -rf "$RECORD"
}
