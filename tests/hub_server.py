"""
A small Hub on the loopback address: the part of its HTTP protocol that the `huggingface_hub` client uses to create a
model, upload to it (small files in the commit, large ones by the LFS protocol), look at it and download from it.

Everything is kept in memory. `fail` makes the next requests go wrong, as a network or a server in trouble does.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


MAX_BODY_BYTES = 64 * 2**20
MAX_REQUESTS = 2000
LARGE_SUFFIXES = (".safetensors", ".mp4", ".png", ".wav")


@dataclass
class File:
    content: bytes
    is_large: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self):
        return self.sha256 if self.is_large else self.blob_id


@dataclass
class Repository:
    private: bool
    commits: list = field(default_factory=list)

    def __post_init__(self):
        self.commit("initial commit", {})

    @property
    def sha(self):
        return self.commits[-1][0]

    @property
    def files(self):
        return self.commits[-1][2]

    def commit(self, title, files):
        sha = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        return sha

    def at(self, revision):
        return next((files for sha, _, files in self.commits if revision == sha), self.files)


@dataclass
class Fault:
    """
    What goes wrong: a status, `"drop"` before the request is read, `"lose"` the answer to what was done, or `"cut"` the
    answer's content in half.
    """

    kind: int | str
    times: int
    pattern: str


class HubServer(ThreadingHTTPServer):
    """
    `with HubServer() as hub:` serves `hub.endpoint` until the block ends. Users are known by their tokens: `"write"` and
    `"read"` are those of `tester`, `"other"` belongs to someone else.
    """

    daemon_threads = True

    def __init__(self, part_size=None):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.part_size = part_size
        self.repositories, self.large, self.parts = {}, {}, {}
        self.requests, self.faults = [], []
        self.lock = threading.RLock()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self):
        # Another origin than the endpoint, as the real storage has: tokens must not be sent there.
        return f"http://localhost:{self.server_port}/storage"

    def fail(self, kind, times=1, pattern=""):
        """Makes the next `times` requests fail whose `"METHOD /path"` has the pattern in it."""
        self.faults.append(Fault(kind, times, pattern))

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.kind
        return None

    def asked(self, pattern):
        """The requests so far that have the pattern in them."""
        return [request for request in self.requests if re.search(pattern, request)]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass


USERS = {"write": ("tester", "write"), "read": ("tester", "read"), "other": ("somebody", "write")}


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "auth_check"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("POST", r"/complete/(?P<oid>[0-9a-f]{64})", "complete"),
        ("POST", r"/verify", "verify"),
        ("HEAD|GET", r"/storage/(?P<oid>[0-9a-f]{64})", "stored"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def serve(self):
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        if len(self.server.requests) >= MAX_REQUESTS:
            self.close_connection = True
            return
        self.server.requests.append(request)
        fault = self.server.take_fault(request)
        if fault == "drop":
            self.close_connection = True
            return
        self.body, self.fault = self.read_body(), fault
        if isinstance(fault, int):
            # As a proxy says it, not as the Hub does: no JSON.
            self.answer("<html>in trouble</html>", fault, {"Content-Type": "text/html"})
            return
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, unquote(url.path))
            if match and self.command in methods.split("|"):
                with self.server.lock:
                    getattr(self, name)(**match.groupdict())
                return
        self.answer({"error": "no such address"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while (size := int(self.rfile.readline(), 16)) and len(body) + size <= MAX_BODY_BYTES:
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_BODY_BYTES))

    def answer(self, content, status=200, headers=None):
        if self.fault == "lose":
            self.close_connection = True
            return
        if not isinstance(content, bytes):
            content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.close_connection |= self.fault == "cut"
            self.wfile.write(content[: len(content) // 2] if self.fault == "cut" else content)

    # Who asks

    @property
    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return USERS.get(token, (None, None))

    def may_write(self, repo):
        user, role = self.user
        if role == "write" and repo.split("/")[0] == user:
            return True
        self.answer({"error": "You don't have the rights to do this"}, 401 if user is None else 403)
        return False

    def repository(self, repo):
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and self.user[0] != repo.split("/")[0]):
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    # The answers, by the name of the route

    def whoami(self):
        user, role = self.user
        if user is None:
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        token = {"displayName": "test", "role": role}
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}})

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self.user[0]}/{wanted['name']}"
        if not self.may_write(repo):
            return
        is_there = repo in self.server.repositories
        if not is_there:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.server.repositories[repo] = Repository(private)
        self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo}, 409 if is_there else 200)

    def validate(self):
        content = json.loads(self.body)["content"]
        is_valid = re.match(r"---\n.+?\n---\n", content, re.DOTALL) is not None
        if is_valid:
            return self.answer({"errors": [], "warnings": []})
        self.answer({"error": "no YAML", "errors": [{"message": "no YAML"}]}, 400)

    def auth_check(self, repo, write):
        if self.repository(repo) is not None and (write is None or self.may_write(repo)):
            self.answer({})

    def preupload(self, repo, revision):
        repository = self.repository(repo)
        if repository is None or not self.may_write(repo):
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            old = repository.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and old.oid})
        self.answer({"files": answers})

    def batch(self, repo):
        if not self.may_write(repo):
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in self.server.large:
                upload = {"href": f"{self.server.storage}/{oid}"}
                if self.server.part_size and size > self.server.part_size:
                    count = -(-size // self.server.part_size)
                    parts = {str(i): f"{self.server.storage}/{oid}/{i}" for i in range(1, count + 1)}
                    header = {"chunk_size": str(self.server.part_size)} | parts
                    upload = {"href": f"{self.server.endpoint}/complete/{oid}", "header": header}
                item |= {"actions": {"upload": upload, "verify": {"href": f"{self.server.endpoint}/verify"}}}
            objects.append(item)
        self.answer(
            {"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
        )

    def put(self, oid, part):
        if self.headers.get("Authorization"):
            return self.answer({"error": "the storage must not see tokens"}, 400)
        etag = hashlib.md5(self.body).hexdigest()
        if part is not None:
            self.server.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() == oid:
            self.server.large[oid] = self.body
        else:
            return self.answer({"error": "the content has another hash"}, 400)
        self.answer({}, headers={"ETag": etag})

    def complete(self, oid):
        parts = json.loads(self.body)["parts"]
        content = b"".join(self.server.parts[oid, part["partNumber"]] for part in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer({"error": "the content has another hash"}, 400)
        self.server.large[oid] = content
        self.answer({})

    def verify(self):
        wanted = json.loads(self.body)
        self.answer({}, 200 if len(self.server.large.get(wanted["oid"], b"")) == wanted["size"] else 404)

    def commit(self, repo, revision):
        repository = self.repository(repo)
        if repository is None or not self.may_write(repo):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
            elif line["key"] == "lfsFile" and value["oid"] in self.server.large:
                files[value["path"]] = File(self.server.large[value["oid"]], is_large=True)
            else:
                return self.answer({"error": f"can't commit {line['key']} {value['path']}"}, 400)
        sha = repository.commit(lines[0]["value"]["summary"], files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}"})

    def info(self, repo, revision):
        repository = self.repository(repo)
        if repository is None:
            return
        siblings = [{"rfilename": path} for path in repository.files]
        facts = {"id": repo, "modelId": repo, "sha": repository.sha, "private": repository.private}
        self.answer(facts | {"tags": [], "downloads": 0, "siblings": siblings})

    def tree(self, repo, revision, folder):
        repository = self.repository(repo)
        if repository is None:
            return
        entries = []
        for path, file in repository.at(revision).items():
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            if file.is_large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            if not folder or path.startswith(f"{folder}/"):
                entries.append(entry)
        self.answer(entries)

    def resolve(self, repo, revision, path):
        repository = self.repository(repo)
        if repository is None:
            return
        file = repository.at(revision).get(path)
        headers = {"X-Repo-Commit": repository.sha}
        if file is None:
            return self.answer({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.is_large:
            return self.answer(file.content, 200, headers)
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.answer(b"", 302, headers | {"Location": f"{self.server.storage}/{file.sha256}"})

    def stored(self, oid):
        content = self.server.large.get(oid)
        if content is None or self.headers.get("Authorization"):
            return self.answer({"error": "not found, or asked with a token"}, 404)
        status, headers = 200, {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2]) + 1 if match[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self.answer(content, status, headers)
