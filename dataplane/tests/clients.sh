#!/usr/bin/env bash
# clients.sh HOST:PORT USER PASSWORD NOAUTH_PORT
#
# Runs the clients people use through a proxy and says `ok NAME`, `FAIL NAME` or `skip NAME` for each; exits 1
# when one failed. HOST:PORT must speak SOCKS5 and HTTP and want a password; HOST:NOAUTH_PORT must speak
# SOCKS5, SOCKS4 and HTTP and want none. Both must allow 127.0.0.0/8 and ::1/128 as targets. The proxy counts
# failed logins (6 here): raise auth.failures_per_address to run this often. All targets are this script's own,
# on loopback ports the kernel chose. The unknown name ends in .invalid; the proxy asks its resolver for it.
#
# Found where they are, or given: PYTHON (with PySocks, python_socks), NODE_PATH (with socks,
# playwright-core), CHROMIUM, SOCKSTEST. VERBOSE=1 shows what a failed client said as it fails.
set -u
[ $# -eq 4 ] || { echo "usage: $0 HOST:PORT USER PASSWORD NOAUTH_PORT" >&2; exit 2; }
HOST=${1%:*} PORT=${1##*:} USR=$2 PW=$3 NOAUTH=$4
AUTH=$HOST:$PORT OPEN=$HOST:$NOAUTH
PYTHON=${PYTHON:-$(command -v python3)} NODE_PATH=${NODE_PATH:-} SOCKSTEST=${SOCKSTEST:-$(command -v sockstest)}
[ -z "${CHROMIUM:-}" ] && CHROMIUM=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
export NODE_PATH
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY
command -v curl >/dev/null && [ -n "$PYTHON" ] || { echo "curl and python3 are needed" >&2; exit 2; }

D=$(mktemp -d) PIDS=() MADE_SSHD= FAILED=0
finish() {
    local pid
    for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null; done
    for pid in "${PIDS[@]}"; do wait "$pid" 2>/dev/null; done
    [ -n "$MADE_SSHD" ] && rmdir /run/sshd 2>/dev/null
    rm -rf "$D"
}
trap finish EXIT
trap 'exit 130' INT TERM

# ---------------------------------------------------------------- reporting
OUT=$D/out
ok() { echo "ok $1"; }
skip() { echo "skip $1"; }
bad() { echo "FAIL $1"; FAILED=1; [ -n "${VERBOSE:-}" ] && { shift; echo "  $*"; head -c 2000 "$OUT" | sed 's/^/  | /'; } >&2; return 0; }
have() { command -v "$1" >/dev/null 2>&1; }
# t NAME COMMAND...: must exit 0.
t() { local n=$1; shift; if "$@" >"$OUT" 2>&1; then ok "$n"; else bad "$n" "exit $?: $*"; fi; }
# is NAME EXPECTED COMMAND...: must exit 0 and print exactly EXPECTED.
is() {
    local n=$1 e=$2 rc; shift 2; "$@" >"$OUT" 2>&1; rc=$?
    if [ $rc -eq 0 ] && [ "$(cat "$OUT")" = "$e" ]; then ok "$n"; else bad "$n" "exit $rc, expected '$e': $*"; fi
}
# no NAME EXIT PATTERN COMMAND...: must fail with that exit status and say something matching.
no() {
    local n=$1 x=$2 p=$3 rc; shift 3; "$@" >"$OUT" 2>&1; rc=$?
    if [ $rc -eq "$x" ] && { [ -z "$p" ] || grep -qE -- "$p" "$OUT"; }; then ok "$n"; else bad "$n" "exit $rc, expected $x and /$p/: $*"; fi
}
c() { curl -q -sS -m 20 --noproxy '' "$@"; }

# ---------------------------------------------------------------- targets
mkdir "$D/git" "$D/got"
head -c 67108864 /dev/urandom > "$D/file"; SUM=$(sha256sum < "$D/file" | cut -d' ' -f1)
if have git; then
    G=(git -c init.defaultBranch=main -c user.name=t -c user.email=t@t -c commit.gpgsign=false)
    { "${G[@]}" init -q "$D/w" && head -c 8388608 "$D/file" > "$D/w/blob" && "${G[@]}" -C "$D/w" add blob &&
      "${G[@]}" -C "$D/w" commit -qm one && git clone -q --bare "$D/w" "$D/git/repo.git" &&
      git -C "$D/git/repo.git" update-server-info; } >/dev/null 2>&1
fi
cat > "$D/target.py" <<'PY'
import hashlib, http.server, os, shutil, socket, socketserver, subprocess, sys, threading
D = sys.argv[1]
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def say(self, body, kind="text/plain"):
        self.send_response(200); self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def body(self):
        if "100-continue" in self.headers.get("Expect", ""): pass      # the base class has answered
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while n := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(n); self.rfile.readline()
            self.rfile.readline(); return
        n = int(self.headers.get("Content-Length") or 0)
        while n and (b := self.rfile.read(min(n, 1 << 20))): n -= len(b); yield b
    def do_GET(self):
        if self.path == "/file":
            self.send_response(200); self.send_header("Content-Length", str(os.path.getsize(D + "/file"))); self.end_headers()
            with open(D + "/file", "rb") as f: shutil.copyfileobj(f, self.wfile, 1 << 18)
        elif self.path == "/gib":
            self.send_response(200); self.send_header("Content-Length", str(16 * os.path.getsize(D + "/file"))); self.end_headers()
            for _ in range(16):
                with open(D + "/file", "rb") as f: shutil.copyfileobj(f, self.wfile, 1 << 18)
        elif self.path == "/headers": self.say(str(self.headers).encode())
        elif self.path.startswith("/git/"): self.cgi()
        else: self.say(b"hello " + self.path.encode(), "text/html")
    def do_PUT(self):
        h = hashlib.sha256()
        for b in self.body(): h.update(b)
        self.say(h.hexdigest().encode())
    def do_POST(self): self.cgi() if self.path.startswith("/git/") else self.do_PUT()
    def cgi(self):
        path, _, query = self.path[4:].partition("?"); body = b"".join(self.body())
        env = dict(os.environ, GIT_PROJECT_ROOT=D + "/git", GIT_HTTP_EXPORT_ALL="1", PATH_INFO=path, QUERY_STRING=query,
            REQUEST_METHOD=self.command, CONTENT_TYPE=self.headers.get("Content-Type", ""), CONTENT_LENGTH=str(len(body)),
            HTTP_CONTENT_ENCODING=self.headers.get("Content-Encoding", ""), GIT_PROTOCOL=self.headers.get("Git-Protocol", ""),
            REMOTE_ADDR="127.0.0.1", GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="safe.directory", GIT_CONFIG_VALUE_0="*")
        out = subprocess.run(["git", "http-backend"], input=body, env=env, stdout=subprocess.PIPE).stdout
        head, _, data = out.partition(b"\r\n\r\n"); status = 200; fields = []
        for k, _, v in (l.partition(": ") for l in head.decode().split("\r\n")):
            if k == "Status": status = int(v.split()[0])
            else: fields.append((k, v))
        self.send_response(status)
        for f in fields + [("Content-Length", str(len(data)))]: self.send_header(*f)
        self.end_headers(); self.wfile.write(data)
class S(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True; request_queue_size = 128; allow_reuse_address = True
    def handle_error(self, *a): pass
class S6(S): address_family = socket.AF_INET6
class Echo(socketserver.BaseRequestHandler):          # what came, until the client has ended its half; then "."
    def handle(self):
        while b := self.request.recv(65536): self.request.sendall(b)
        self.request.sendall(b".")
for _ in range(50):
    a = S(("127.0.0.1", 0), H)
    try: b = S6(("::1", a.server_address[1]), H); break
    except OSError as e:
        b = None
        if e.errno != 98: break                          # no IPv6 here
        a.server_close()
e = S(("127.0.0.1", 0), Echo)
with socket.socket() as s: s.bind(("127.0.0.1", 0)); dead = s.getsockname()[1]
with socket.socket() as s: s.bind(("127.0.0.1", 0)); free = s.getsockname()[1]
with socket.socket() as s: s.bind(("127.0.0.1", 0)); ssh = s.getsockname()[1]
for s in filter(None, (a, b, e)): threading.Thread(target=s.serve_forever, daemon=True).start()
with open(D + "/ports.new", "w") as f: print(a.server_address[1], int(b is not None), e.server_address[1], dead, free, ssh, file=f)
os.rename(D + "/ports.new", D + "/ports")
threading.Event().wait()
PY
"$PYTHON" "$D/target.py" "$D" 2>"$D/target.log" & PIDS+=($!)
for _ in {1..100}; do [ -e "$D/ports" ] && break; sleep .05; done
[ -e "$D/ports" ] || { echo "no targets: $(cat "$D/target.log")" >&2; exit 2; }
read -r WEB V6 ECHO DEAD FREE SSH < "$D/ports"

# ---------------------------------------------------------------- curl: every way in, every kind of target
HOSTS=(ipv4 127.0.0.1 name localhost); [ "$V6" = 1 ] && HOSTS+=(ipv6 '[::1]')
for ((i = 0; i < ${#HOSTS[@]}; i += 2)); do
    k=${HOSTS[i]} u=http://${HOSTS[i+1]}:$WEB/x
    is "curl-socks5h-$k" "hello /x" c --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "$u"
    is "curl-socks5-$k"  "hello /x" c --socks5 "$AUTH" --proxy-user "$USR:$PW" "$u"
    is "curl-http-$k"    "hello /x" c -x "http://$AUTH" -U "$USR:$PW" "$u"
    is "curl-connect-$k" "hello /x" c -x "http://$AUTH" -U "$USR:$PW" -p "$u"
    is "curl-open-socks5h-$k" "hello /x" c --socks5-hostname "$OPEN" "$u"
    is "curl-open-http-$k"    "hello /x" c -x "http://$OPEN" "$u"
    is "curl-open-connect-$k" "hello /x" c -x "http://$OPEN" -p "$u"
    [ "$k" = ipv6 ] || is "curl-open-socks4a-$k" "hello /x" c --socks4a "$OPEN" "$u"
done
[ "$V6" = 1 ] || for m in socks5h socks5 http connect; do skip "curl-$m-ipv6"; done
U=http://127.0.0.1:$WEB/x
is curl-open-socks4-ipv4 "hello /x" c --socks4 "$OPEN" "$U"
# --proxy-anyauth asks without a password first, then answers the challenge.
is curl-http-anyauth "hello /x" c -x "http://$AUTH" --proxy-anyauth -U "$USR:$PW" "$U"
is curl-connect-anyauth "hello /x" c -x "http://$AUTH" --proxy-anyauth -U "$USR:$PW" -p "$U"

# wrong password and none (5 failed logins; wget adds one)
no wrong-password-socks5h 97 'rejected|User' c --socks5-hostname "$AUTH" --proxy-user "$USR:wrong-$PW" "$U"
no wrong-password-socks5  97 'rejected|User' c --socks5 "$AUTH" --proxy-user "$USR:wrong-$PW" "$U"
no wrong-password-http    22 '407'           c -f -x "http://$AUTH" -U "$USR:wrong-$PW" "$U"
no wrong-password-connect 56 '407'           c -x "http://$AUTH" -U "$USR:wrong-$PW" -p "$U"
no unknown-user-socks5h   97 'rejected|User' c --socks5-hostname "$AUTH" --proxy-user "nobody-$RANDOM:$PW" "$U"
no no-password-socks5h 97 'auth|method' c --socks5-hostname "$AUTH" "$U"
no no-password-socks5  97 'auth|method' c --socks5 "$AUTH" "$U"
no no-password-http    22 '407'         c -f -x "http://$AUTH" "$U"
no no-password-connect 56 '407'         c -x "http://$AUTH" -p "$U"
no no-password-socks4a 97 ''            c --socks4a "$AUTH" "$U"

# the proxy's password goes no further
headers() { c "$@" "http://127.0.0.1:$WEB/headers" > "$D/headers" && grep -qi '^host: 127.0.0.1' "$D/headers" && ! grep -qiE '^proxy-' "$D/headers"; }
t http-no-leak headers -x "http://$AUTH" -U "$USR:$PW"

# ---------------------------------------------------------------- 64 MiB each way, and 1 GiB
sum() { c "$@" | sha256sum | cut -d' ' -f1; }
put() { c -T "$D/file" "$@" "http://127.0.0.1:$WEB/up"; }
chunked() { c -T - "$@" "http://127.0.0.1:$WEB/up" < "$D/file"; }
F=http://127.0.0.1:$WEB/file
is download-socks5h "$SUM" sum --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "$F"
is download-http    "$SUM" sum -x "http://$AUTH" -U "$USR:$PW" "$F"
is download-connect "$SUM" sum -x "http://$AUTH" -U "$USR:$PW" -p "$F"
is upload-socks5h   "$SUM" put --socks5-hostname "$AUTH" --proxy-user "$USR:$PW"
is upload-http      "$SUM" put -x "http://$AUTH" -U "$USR:$PW"
is upload-connect   "$SUM" put -x "http://$AUTH" -U "$USR:$PW" -p
gib() { for _ in {1..16}; do cat "$D/file"; done; }
GIB=$(gib | sha256sum | cut -d' ' -f1)
put_gib() { gib | c -m 120 -T - "$@" "http://127.0.0.1:$WEB/up"; }
is download-socks5h-1-gib "$GIB" sum -m 120 --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "http://127.0.0.1:$WEB/gib"
is upload-socks5h-1-gib   "$GIB" put_gib --socks5-hostname "$AUTH" --proxy-user "$USR:$PW"
is upload-http-chunked "$SUM" chunked -x "http://$AUTH" -U "$USR:$PW"

# three URLs, one connection to the proxy
keepalive() {
    c -x "http://$AUTH" -U "$USR:$PW" -w ' %{num_connects}\n' "http://127.0.0.1:$WEB/1" "http://127.0.0.1:$WEB/2" "http://127.0.0.1:$WEB/3"
}
is http-keep-alive $'hello /1 1\nhello /2 0\nhello /3 0' keepalive

# ---------------------------------------------------------------- refusals
no closed-port-socks5h 97 '\(5\)' c --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "http://127.0.0.1:$DEAD/"
no closed-port-socks4  97 'rejected|failed|\(91\)|91' c --socks4 "$OPEN" "http://127.0.0.1:$DEAD/"
no closed-port-http    22 ' 50[234]' c -f -x "http://$AUTH" -U "$USR:$PW" "http://127.0.0.1:$DEAD/"
no closed-port-connect 56 ' 50[234]' c -x "http://$AUTH" -U "$USR:$PW" -p "http://127.0.0.1:$DEAD/"
no unknown-name-socks5h 97 '\(4\)'   c --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" http://no-such-host.invalid/
no unknown-name-http    22 ' 50[234]' c -f -x "http://$AUTH" -U "$USR:$PW" http://no-such-host.invalid/
no unknown-name-connect 56 ' 50[234]' c -x "http://$AUTH" -U "$USR:$PW" -p http://no-such-host.invalid/
LONG=$(printf 'a%.0s' {1..60}); LONG=$LONG.$LONG.$LONG.$LONG.${LONG:4}   # 300 bytes
no long-name-http    22 ' 400' c -f -x "http://$AUTH" -U "$USR:$PW" "http://$LONG/"
no long-name-connect 56 ' 400' c -x "http://$AUTH" -U "$USR:$PW" -p "http://$LONG/"
no long-name-socks5h 97 ''     c --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "http://$LONG/"   # curl itself refuses
is after-refusals "hello /x" c --socks5-hostname "$AUTH" --proxy-user "$USR:$PW" "$U"

# ---------------------------------------------------------------- nc, ssh
if have nc && nc -h 2>&1 | grep -q -- '-X'; then
    nce() { printf 'some words' | timeout 10 nc -N -X "$1" -x "$OPEN" 127.0.0.1 "$ECHO"; }
    for m in 4 5 connect; do is "nc-$m-half-close" 'some words.' nce "$m"; done
    if [ -x /usr/sbin/sshd ] && have ssh && have ssh-keygen; then
        ssh-keygen -q -t ed25519 -N '' -f "$D/host"; ssh-keygen -q -t ed25519 -N '' -f "$D/id"; cp "$D/id.pub" "$D/keys"
        printf '%s\n' "Port $SSH" 'ListenAddress 127.0.0.1' "HostKey $D/host" "AuthorizedKeysFile $D/keys" 'PidFile none' \
            'StrictModes no' 'UsePAM no' 'PasswordAuthentication no' 'PermitRootLogin prohibit-password' > "$D/sshd.conf"
        [ "$(id -u)" = 0 ] && [ ! -d /run/sshd ] && mkdir -p -m 755 /run/sshd && MADE_SSHD=1
        /usr/sbin/sshd -D -e -f "$D/sshd.conf" 2>"$D/sshd.log" & PIDS+=($!)
        for _ in {1..100}; do nc -z 127.0.0.1 "$SSH" 2>/dev/null && break; sleep .05; done
        via() {
            timeout 20 ssh -F none -p "$SSH" -i "$D/id" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
                -o LogLevel=ERROR -o BatchMode=yes -o ConnectTimeout=10 -o "ProxyCommand=nc -X $1 -x $OPEN %h %p" "$(id -un)@127.0.0.1" cat
        }
        both() { head -c 8388608 "$D/file" | via "$1" | cmp - <(head -c 8388608 "$D/file"); }
        t ssh-nc-5 both 5
        t ssh-nc-connect both connect
    else skip ssh-nc-5; skip ssh-nc-connect; fi
else skip nc; skip ssh-nc-5; skip ssh-nc-connect; fi

# ---------------------------------------------------------------- git, wget
if have git && [ -e "$D/git/repo.git/HEAD" ]; then
    clone() {
        GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_TERMINAL_PROMPT=0 timeout 20 \
            git -c "http.proxy=$2" -c http.proxyAuthMethod=basic clone -q "http://127.0.0.1:$WEB/git/repo.git" "$D/got/$1" && cmp "$D/w/blob" "$D/got/$1/blob"
    }
    t git-socks5h clone a "socks5h://$USR:$PW@$AUTH"
    t git-http    clone b "http://$USR:$PW@$AUTH"
else skip git-socks5h; skip git-http; fi
if have wget; then
    wg() { wget -qO- -T 10 -t 1 --no-config -e use_proxy=on -e "http_proxy=http://$AUTH" --proxy-user="$USR" --proxy-password="$1" "$U"; }
    is wget-http "hello /x" wg "$PW"
    no wget-wrong-password 8 '' wg "wrong-$PW"
else skip wget-http; skip wget-wrong-password; fi

# ---------------------------------------------------------------- Python
HP=("$HOST" "$PORT" "$USR" "$PW" "$ECHO" "$NOAUTH")
if "$PYTHON" -c 'import socks' 2>/dev/null; then
    pysocks() { timeout 15 "$PYTHON" - "${HP[@]}" <<'PY'
import socks, sys
h, p, u, w, t, o = sys.argv[1:]; t = int(t)
def echo(kind, port, *login, host="127.0.0.1", rdns=True):
    s = socks.socksocket(); s.settimeout(5); s.set_proxy(kind, h, int(port), rdns, *login); s.connect((host, t))
    s.sendall(b"ping"); assert s.recv(9) == b"ping"; s.close()
for host in ("127.0.0.1", "localhost"):
    echo(socks.SOCKS5, p, u, w, host=host); echo(socks.SOCKS5, o, host=host); echo(socks.SOCKS4, o, host=host); echo(socks.HTTP, o, host=host)
echo(socks.SOCKS5, p, u, w, rdns=False)
try: echo(socks.SOCKS5, p)
except socks.ProxyError: pass
else: sys.exit("served without a password")
PY
    }; t pysocks pysocks
else skip pysocks; fi
if "$PYTHON" -c 'import python_socks' 2>/dev/null; then
    python_socks() { timeout 15 "$PYTHON" - "${HP[@]}" <<'PY'
import asyncio, sys
from python_socks import ProxyType, ProxyError
from python_socks.async_.asyncio import Proxy
h, p, u, w, t, o = sys.argv[1:]
async def echo(kind, port, user=None, password=None, host="127.0.0.1", rdns=True):
    k = await Proxy.create(proxy_type=kind, host=h, port=int(port), username=user, password=password, rdns=rdns).connect(dest_host=host, dest_port=int(t), timeout=5)
    r, x = await asyncio.open_connection(sock=k); x.write(b"ping"); assert await r.readexactly(4) == b"ping"; x.close()
async def main():
    for host in ("127.0.0.1", "localhost"):
        for kind in (ProxyType.SOCKS5, ProxyType.HTTP): await echo(kind, p, u, w, host)
        for kind in (ProxyType.SOCKS5, ProxyType.SOCKS4, ProxyType.HTTP): await echo(kind, o, host=host)
    try: await echo(ProxyType.HTTP, p)
    except ProxyError: pass
    else: sys.exit("served without a password")
asyncio.run(main())
PY
    }; t python-socks python_socks
else skip python-socks; fi

# ---------------------------------------------------------------- Node, Chromium
if have node && node -e 'require("socks")' 2>/dev/null; then
    node_socks() { timeout 15 node - "${HP[@]}" <<'JS'
const { SocksClient } = require('socks'), [h, p, u, w, t, o] = process.argv.slice(2);
const echo = async (type, port, login, host) => {
  const { socket } = await SocksClient.createConnection({ proxy: { host: h, port: +port, type, ...login }, command: 'connect', destination: { host, port: +t }, timeout: 5000 });
  await new Promise((ok, no) => { socket.on('error', no); socket.on('data', d => d.toString() === 'ping' ? ok() : no(new Error('got ' + d))); socket.resume(); socket.write('ping'); }); socket.destroy();
};
(async () => {
  const login = { userId: u, password: w };
  for (const host of ['127.0.0.1', 'localhost']) { await echo(5, p, login, host); await echo(5, o, {}, host); await echo(4, o, {}, host); }
  try { await echo(5, p, {}, '127.0.0.1'); } catch { return; }
  throw new Error('served without a password');
})().catch(e => { console.log(e); process.exit(1); });
JS
    }; t node-socks node_socks
else skip node-socks; fi
if have node && [ -n "$CHROMIUM" ] && node -e 'require("playwright-core")' 2>/dev/null; then
    chrome() { HOME=$D TMPDIR=$D timeout -k 5 150 node - "$AUTH" "$USR" "$PW" "$WEB" "$CHROMIUM" <<'JS'
const { chromium } = require('playwright-core'), [at, username, password, web, executablePath] = process.argv.slice(2);
(async () => {
  const b = await chromium.launch({
    executablePath, headless: true, chromiumSandbox: false, timeout: 60000,
    proxy: { server: `http://${at}`, bypass: '<-loopback>,*.com,*.net,*.org', username, password },
    args: ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1'] });
  try {
    const page = await (await b.newContext()).newPage();
    for (const path of ['/one', '/two']) {
      const r = await page.goto(`http://127.0.0.1:${web}${path}`, { timeout: 30000 }), text = await page.textContent('body');
      if (r.status() !== 200 || text !== 'hello ' + path) throw new Error(r.status() + ' ' + text);
    }
  } finally { await b.close(); }
})().catch(e => { console.log(e); process.exit(1); });
JS
    }; t chromium-http chrome
else skip chromium-http; fi

# ---------------------------------------------------------------- sockstest
if [ -x "$SOCKSTEST" ] && [[ $HOST =~ ^[0-9.]+$ ]]; then
    # It exits 0 whatever happened: a failed case says so. Never the *_hostname cases, they ask the outside.
    st() {
        local at=$1; shift
        timeout 20 "$SOCKSTEST" --proxyip "$HOST" --proxyport "$at" --serverip 127.0.0.1 --serverport "$FREE" "$@" > "$D/st" 2>&1; local rc=$?
        cat "$D/st"; [ $rc -eq 0 ] && ! grep -qiE 'fail|error|panic' "$D/st"
    }
    t sockstest-socks5_connect st "$NOAUTH" --casename socks5_connect
    t sockstest-socks5_auth_connect st "$PORT" --casename socks5_auth_connect --auth "$USR:$PW"
    t sockstest-socks4_connect st "$NOAUTH" --casename socks4_connect
else for n in socks5_connect socks5_auth_connect socks4_connect; do skip "sockstest-$n"; done; fi

exit $FAILED
