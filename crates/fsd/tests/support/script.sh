# Runs in the guest.
check() { what=$1; shift; if eval "$*" >/tmp.out 2>&1; then echo "ok $what"; else echo "FAILED $what: $(cat /tmp.out)"; fi; }
fails() { what=$1; shift; if eval "$*" >/tmp.out 2>&1; then echo "FAILED $what should not work: $(cat /tmp.out)"; else echo "ok $what fails: $(cat /tmp.out)"; fi; }

mkdir /etc; echo 'user:x:1000:1000::/:/bin/sh' > /etc/passwd
for tag in rw ro one; do mkdir -p /mnt/$tag; check "mount $tag" mount -t virtiofs $tag /mnt/$tag; done

cd /mnt/rw
check "write"            'echo hello > made && [ "$(cat made)" = hello ]'
check "chown and chmod"  'chown 1000:1001 made && chmod 640 made && [ "$(stat -c %u:%g:%a made)" = 1000:1001:640 ]'
check "append"           'echo a > log && echo b >> log && [ "$(wc -l < log)" = 2 ]'
check "rename"           'mv log log2 && [ -e log2 ] && [ ! -e log ]'
check "hard link"        'ln log2 log3 && [ "$(stat -c %h log2)" = 2 ]'
check "truncate"         'truncate -s 1000000 log2 && [ "$(stat -c %s log3)" = 1000000 ]'
check "remove"           'rm log2 log3 && [ ! -e log2 ]'
check "fifo"             'mkfifo pipe && [ -p pipe ]'
check "another user"     'chmod 777 . && start-stop-daemon -S -c 1000:1000 -x /bin/touch -- /mnt/rw/by-user && [ "$(stat -c %u by-user)" = 1000 ]'
check "set-id and owner"  'echo x > sid && chmod 4777 sid && chown 1000:1000 sid && [ "$(stat -c %a sid)" = 777 ]'
check "set-id and root"   'chmod 4777 sid && echo y >> sid && [ "$(stat -c %a sid)" = 4777 ]'
check "set-id and write"  'su user -c "echo z >> sid" && [ "$(stat -c %a sid)" = 777 ] && [ "$(wc -l < sid)" = 3 ]'
check "set-id and cut"    'chmod 6777 sid && su user -c "truncate -s 1 sid" && [ "$(stat -c %a sid)" = 777 ]'
check "set-id and open"   'chmod 4777 sid && su user -c "echo > sid" && [ "$(stat -c %a sid)" = 777 ]'
check "past permissions" '[ "$(cat locked/file)" = "for root" ]'
check "16 MiB"           'head -c 16777216 /dev/urandom > /big && cp /big big && cmp big /big && rm big'
check "200 new files"    'mkdir many && cd many && seq 200 | while read n; do echo $n > $n; done; cd .. && [ "$(find many -type f | wc -l)" = 200 ]'
check "5000 files"       '[ "$(find tree -type f | wc -l)" = 5000 ] && [ "$(cat tree/9/* | sort -n | tail -1)" = 4999 ]'
fails "device node"      'mknod null c 1 3'
fails "absolute link"    'cat absolute'
fails "relative link"    'cat relative'
fails "parent"           'cat /mnt/rw/../rw/../secret'

# Each step is told to the host, which looks at it and says when to go on.
step() { echo > "at-$1"; until [ -e "on-$1" ]; do usleep 20000; done; }
step settled
cat kept > /dev/null
step once
check "kept"             'cat kept > /dev/null; cat kept > /dev/null'
step again
check "changed"          '[ "$(head -c 1 kept)" = b ] && [ "$(tail -c 1 kept)" = b ]'

cd /mnt/ro
check "read"             '[ "$(cat file)" = "read me" ]'
fails "write to ro"      'echo x > file'
fails "create in ro"     'echo x > new'
fails "remove in ro"     'rm -f file'
fails "chmod in ro"      'chmod 777 file'
fails "mkdir in ro"      'mkdir d'
check "unchanged"        '[ "$(cat file)" = "read me" ]'

cd /mnt/one
check "one file"         '[ "$(ls -A)" = 0 ] && [ "$(cat 0)" = "of the host" ]'
fails "beside it"        'echo x > other'
echo "all checked"
