#!/bin/sh
# Makes this machine a device of a fleet, in one line:
#
#     sh install.sh --invitation invitation.json --data mine.jsonl
#
# It looks for Python 3.11 or newer, makes a virtual environment, installs what deploy/locks/client.txt names, each file
# checked by its hash, then fedtune, joins by the invitation, and registers the service. Run again, it upgrades what is
# installed and keeps the device. As root it serves the machine, under a user of its own (/opt/fedtune,
# /var/lib/fedtune); as anyone else it serves that user (~/.local/share/fedtune, ~/.fedtune/client).
set -eu

usage() {
    cat <<'USAGE'
usage: sh install.sh --invitation FILE --data FILE [option]...
       sh install.sh                               upgrade, and start again
       sh install.sh --uninstall                   leave the fleet, remove service and programs; the data stays

  --invitation FILE     what `fedtune server init` wrote; nothing in it is secret
  --name NAME           the device's name in the fleet; by default this machine's
  --data FILE           this device's examples; they stay where they are
  --base DIR            a base model's directory on this device; may be given again
  --allow-clear         also take part in jobs whose server sees this device's own updates
  --scores              also score adapters on examples kept back here, for the server to see
  --source SPEC         what to install: a clone of the repository or a wheel; by default the clone this script is in
  --source-hash HASH    the wheel's hash, as sha256:HEX; another wheel is refused
  --edge                without torch: for a device that trains on an edge pack (--base PACK); an upgrade keeps it so
  --lock FILE           exact versions with hashes, and build.txt beside it; by default the clone's deploy/locks/client.txt,
                        or edge.txt
  --python PROGRAM      a Python of version 3.11 or newer; by default the newest that is found
  --torch cpu|cuda      by default what the hardware needs
  --torch-index URL     a second index, for a torch that is built for the CPU; by default there is none, and the lock's torch
                        comes with CUDA libraries, several GB
  --torch-hash HASH     the hash of that build, as sha256:HEX; without --torch-index pip's ordinary places have it
  --user                for this user only, even as root
  --no-service          register no service
  --dry-run             only print what would be done
USAGE
}

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 2
}

say() { printf '%s\n' "$1"; }

run() { # prints the command, and runs it unless this is a dry run
    printf '+ %s\n' "$*"
    [ -n "$dry_run" ] || "$@"
}

invitation='' name='' data='' allow_clear='' scores='' source='' source_hash='' lock='' python='' torch='' uninstall='' dry_run='' service=yes
torch_index='' torch_hash='' system='' extra=''
[ "$(id -u)" -ne 0 ] || system=yes
bases='' # one a line
while [ $# -gt 0 ]; do
    case $1 in
    --invitation | --name | --data | --base | --source | --source-hash | --lock | --python | --torch | --torch-index | --torch-hash)
        [ $# -ge 2 ] || fail "$1: expected a value"
        ;;
    esac
    case $1 in
    --invitation) invitation=$2 && shift ;;
    --name) name=$2 && shift ;;
    --data) data=$2 && shift ;;
    --base) bases="$bases$(realpath -- "$2")
" && shift ;;
    --source) source=$2 && shift ;;
    --source-hash) source_hash=$2 && shift ;;
    --lock) lock=$2 && shift ;;
    --python) python=$2 && shift ;;
    --torch) torch=$2 && shift ;;
    --torch-index) torch_index=$2 && shift ;;
    --torch-hash) torch_hash=$2 && shift ;;
    --edge) extra=edge ;;
    --allow-clear) allow_clear=yes ;;
    --scores) scores=yes ;;
    --user) system='' ;;
    --no-service) service='' ;;
    --uninstall) uninstall=yes ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "$1: unknown option" ;;
    esac
    shift
done

if [ -n "$system" ]; then
    prefix=/opt/fedtune home=/var/lib/fedtune unit=/etc/systemd/system/fedtune-client.service
    template=share/fedtune/systemd/fedtune-client.service
else
    prefix=${XDG_DATA_HOME:-$HOME/.local/share}/fedtune home=$HOME
    unit=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/fedtune-client.service
    template=share/fedtune/systemd/user/fedtune-client.service
fi
device=$home/.fedtune/client
fedtune=$prefix/bin/fedtune

as_device() { # runs a command as the user the device belongs to
    if [ -n "$system" ]; then
        run setpriv --reuid=fedtune --regid=fedtune --clear-groups env "HOME=$home" FEDTUNE_CLIENT_HOME="$device" "$@"
    else
        run env FEDTUNE_CLIENT_HOME="$device" "$@"
    fi
}

manager() { # runs the service manager that the unit belongs to
    if [ -n "$system" ]; then run systemctl "$@"; else run systemctl --user "$@"; fi
}

managed() { # whether there is one
    [ -n "$service" ] || return 1
    if [ -n "$system" ]; then
        [ -d /run/systemd/system ]
    else
        systemctl --user show --property=Version >/dev/null 2>&1
    fi
}

# -- uninstall

if [ -n "$uninstall" ]; then
    if [ -e "$unit" ]; then
        if managed; then manager disable --now fedtune-client; fi
        run rm -f "$unit"
        if managed; then manager daemon-reload; fi
    fi
    if [ -e "$device/device.json" ] && [ -x "$fedtune" ]; then
        as_device "$fedtune" client leave
    fi
    if [ -n "$system" ] && [ -e /etc/systemd/system/fedtune-server.service ]; then
        say "$prefix stays: the server on this machine runs from it"
    elif [ -e "$prefix/pyvenv.cfg" ]; then
        run rm -rf "$prefix"
    fi
    say "this machine is no device any more; the data file is where it was"
    exit 0
fi

# -- check before anything is changed

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ -z "$python" ]; then
    for candidate in python3.13 python3.12 python3.11 /usr/bin/python3 python3; do
        found=$(command -v "$candidate") || continue
        if [ -n "$system" ]; then
            case $(realpath -- "$("$found" -c 'import sys; print(sys.executable)' 2>/dev/null)") in
            /root/* | /home/*) continue ;; # the service could not see it
            esac
        fi
        if usable "$found"; then
            python=$found
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.11 or newer with venv was found; install one (Debian: apt-get install python3 \
python3-venv) or name one with --python"
elif ! usable "$python"; then
    fail "--python $python: not a Python 3.11 or newer with venv"
fi

here=$(cd -- "$(dirname -- "$0")" && pwd)
if [ -z "$source" ]; then
    source=$(dirname -- "$here")
    [ -e "$source/deploy/install.sh" ] || fail "not in a clone of the repository; say what to install with --source"
fi
[ -e "$source" ] || fail "--source $source: no such file or directory"
if [ -z "$extra" ]; then # an upgrade keeps what was installed
    extra=client
    [ ! -r "$prefix/extra" ] || extra=$(cat "$prefix/extra")
fi
if [ "$extra" = edge ] && [ -n "$torch$torch_index$torch_hash" ]; then
    fail "--torch, --torch-index and --torch-hash: a device that was installed with --edge has no torch"
fi
if [ -z "$lock" ]; then
    lock=$here/locks/$extra.txt
    [ ! -d "$source" ] || lock=$source/deploy/locks/$extra.txt
fi
[ -r "$lock" ] || fail "--lock $lock: cannot be read"
for hash in "$source_hash" "$torch_hash"; do
    case $hash in '' | sha256:*) ;; *) fail "$hash: expected sha256:HEX" ;; esac
done
if [ -n "$source_hash" ]; then
    [ -f "$source" ] || fail "--source-hash is for a wheel; $source is none"
    [ "sha256:$(sha256sum -- "$source" | cut -c 1-64)" = "$source_hash" ] || fail "--source $source: has another hash"
fi

joined=''
[ ! -e "$device/device.json" ] || joined=yes
if [ -z "$joined" ]; then
    [ -n "$invitation" ] || fail "this machine is no device yet; expected --invitation FILE and --data FILE"
    [ -r "$invitation" ] || fail "--invitation $invitation: cannot be read"
    [ -n "$data" ] || fail "expected --data FILE, this device's examples"
    [ -s "$data" ] || fail "--data $data: missing or empty"
    invitation=$(realpath -- "$invitation") data=$(realpath -- "$data")
    if [ -n "$system" ]; then
        case $data in
        /root/* | /home/*) fail "--data $data: the service does not see home directories; move it, say to /srv" ;;
        esac
    fi
elif [ -n "$invitation" ]; then
    say "this machine is a device already, and stays it; to become another: sh install.sh --uninstall"
fi

if [ -z "$torch" ]; then
    torch=cpu
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then torch=cuda; fi
fi
case $torch in cpu | cuda) ;; *) fail "--torch $torch: expected cpu or cuda" ;; esac
trainer="torch for $torch"
[ "$extra" = client ] || trainer="no torch"
say "Python $("$python" -c 'import platform; print(platform.python_version())') ($python), $trainer, in $prefix"

# -- install or upgrade

if [ ! -x "$prefix/bin/python" ]; then run "$python" -m venv "$prefix"; fi
set -- sh "$here/locked.sh"
# The lock's torch has CUDA in it. Builds for the CPU are in an index of their own; they are versions like 2.13.0+cpu,
# which pip prefers where it sees both.
if [ "$extra" = client ] && [ "$torch" = cpu ]; then
    [ -z "$torch_index" ] || set -- "$@" --extra-index-url "$torch_index"
    [ -z "$torch_hash" ] || set -- "$@" --torch-hash "$torch_hash"
    [ -n "$torch_index$torch_hash" ] || say "torch brings several GB of CUDA libraries; see --torch-index and --torch-hash"
fi
run "$@" "$prefix/bin/python" "$lock" "fedtune[$extra] @ file://$(realpath -- "$source")"
[ -n "$dry_run" ] || printf '%s\n' "$extra" >"$prefix/extra"

# -- join

if [ -n "$system" ] && ! id fedtune >/dev/null 2>&1; then
    run useradd --system --user-group --home-dir "$home" --no-create-home --shell /usr/sbin/nologin fedtune
fi
if [ -n "$system" ]; then run install -d -o fedtune -g fedtune -m 0700 "$home"; fi
if [ -z "$joined" ]; then
    if [ -n "$system" ]; then # the service's user may read neither its owner's files nor folders
        run install -o fedtune -g fedtune -m 0600 "$invitation" "$home/invitation.json"
        given=$home/invitation.json
    else
        given=$invitation
    fi
    set -- "$fedtune" client join "$given" --data "$data"
    old_ifs=$IFS
    IFS='
'
    for base in $bases; do set -- "$@" --base "$base"; done
    IFS=$old_ifs
    [ -z "$name" ] || set -- "$@" --name "$name"
    [ -z "$allow_clear" ] || set -- "$@" --allow-clear
    [ -z "$scores" ] || set -- "$@" --scores
    as_device "$@"
    [ "$given" = "$invitation" ] || run rm -f "$given"
fi

# -- serve

if managed; then
    run install -D -m 0644 "$prefix/$template" "$unit"
    manager daemon-reload
    manager enable fedtune-client
    manager restart fedtune-client
    if [ -z "$system" ]; then say "to go on after you log out: loginctl enable-linger"; fi
    say "the device serves its fleet; look at it with: $fedtune client status"
else
    say "no service manager: start the device in the foreground with: $fedtune client start"
fi
