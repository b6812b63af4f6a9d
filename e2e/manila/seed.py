"""Makes what a cloud has before its first user, waits for Manila's services, and prints a clouds.yaml.

Arguments: the address, the administrator's password, the user's, and the access rules of a restricted
credential. What is there already stays; that credential is made anew, as its rules may have changed."""
import json
import sys
import time

from keystoneauth1 import exceptions, session
from keystoneauth1.identity import v3

ip, secret, password, rules = sys.argv[1:]
keystone, manila = f"http://{ip}:5000/v3", f"http://{ip}:8786/v2"


def login(name, password):
    return session.Session(v3.Password(keystone, username=name, password=password, project_name=name,
                                       user_domain_id="default", project_domain_id="default"))


admin = login("admin", secret)


def call(method, url, body=None, by=admin):
    headers = {"X-OpenStack-Manila-API-Version": "2.65"}
    try:
        r = by.request(url, method, json=body, headers=headers)
    except exceptions.HttpError as e:
        sys.exit(f"{method} {url}: {e.http_status} {e.response.text}")
    return r.json() if r.content else {}


def ensure(kind, body, url, by=admin):
    """The id of the object of that name, which is made if there is none."""
    for x in call("GET", url, by=by)[kind + "s"]:
        if x.get("name") == body.get("name"):
            return x["id"]
    return call("POST", url, {kind: body}, by)[kind]["id"]


def wait(what, ready, seconds=180):
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"{what}: not ready after {seconds} seconds")
        time.sleep(0.5)


def works():
    """Whether each back end makes a share; the shares are deleted again."""
    urls, states = [], set()
    for kind, protocol, zone in (("cephfs", "CEPHFS", "az-one"), ("cephfs", "CEPHFS", "az-two"), ("dummy", "NFS", "az-one")):
        share = {"name": "probe", "size": 1, "share_type": kind, "share_proto": protocol, "availability_zone": zone}
        urls.append(manila + "/shares/" + call("POST", manila + "/shares", {"share": share}, csi)["share"]["id"])
    for url in urls:
        wait(url, lambda: call("GET", url, by=csi)["share"]["status"] != "creating")
        states.add(call("GET", url, by=csi)["share"]["status"])
        call("DELETE", url, by=csi)
    return states == {"available"}


def answers(url):
    try:
        return session.Session().get(url, raise_exc=False, authenticated=False).status_code < 500
    except exceptions.ClientException:
        return False


wait("keystone", lambda: answers(keystone))
region = call("GET", keystone + "/regions")["regions"][0]["id"]
service = ensure("service", {"name": "manilav2", "type": "sharev2"}, keystone + "/services")
ensure("endpoint", {"service_id": service, "interface": "public", "url": manila, "region_id": region},
       f"{keystone}/endpoints?service_id={service}")
project = ensure("project", {"name": "csi", "domain_id": "default"}, keystone + "/projects")
user = ensure("user", {"name": "csi", "domain_id": "default", "password": password}, keystone + "/users")
member = ensure("role", {"name": "member"}, keystone + "/roles")
call("PUT", f"{keystone}/projects/{project}/users/{user}/roles/{member}")
csi = login("csi", password)
credentials = f"{keystone}/users/{user}/application_credentials"
credential = ensure("application_credential", {"name": "csi", "secret": password}, credentials, csi)
for old in call("GET", credentials, by=csi)["application_credentials"]:
    if old["name"] == "restricted":
        call("DELETE", f"{credentials}/{old['id']}", by=csi)
restricted = ensure("application_credential", {"name": "restricted", "secret": password, "access_rules": json.loads(rules)},
                    credentials, csi)
trustee = ensure("user", {"name": "trustee", "domain_id": "default", "password": password}, keystone + "/users")
trusts = f"{keystone}/OS-TRUST/trusts"
trust = [x["id"] for x in call("GET", f"{trusts}?trustor_user_id={user}", by=csi)["trusts"]]
if not trust:
    trust = [call("POST", trusts, {"trust": {"trustor_user_id": user, "trustee_user_id": trustee, "project_id": project,
                                             "roles": [{"name": "member"}], "impersonation": True}}, csi)["trust"]["id"]]

wait("manila-api", lambda: answers(manila))
snapshots = {"snapshot_support": "True", "create_share_from_snapshot_support": "True"}
for name, specs in {
    "cephfs": {"share_backend_name": "CEPHFS", **snapshots},
    "cephfs-az-two": {"share_backend_name": "CEPHFS", "availability_zones": "az-two", **snapshots},
    "dummy": {"share_backend_name": "DUMMY", "mount_snapshot_support": "True",
              "revert_to_snapshot_support": "True", **snapshots},
    "nowhere": {"share_backend_name": "NOWHERE", **snapshots},  # its shares end in error
}.items():
    ensure("share_type", {"name": name, "extra_specs": {"driver_handles_share_servers": "False", **specs}},
           manila + "/types?is_public=all")

backends = {"lab@cephfs1", "lab@cephfs2", "lab@dummy"}
wait("manila-share", lambda: backends <= {
    s["host"] for s in call("GET", manila + "/services")["services"] if s["state"] == "up"})
# A service that was up a minute ago still counts as up, and the list of pools may
# be ten minutes old: what tells is whether each back end makes a share.
wait("the back ends", works)

print(f"""clouds:
  lab:
    auth:
      auth_url: {keystone}
      username: csi
      password: {password}
      project_name: csi
      user_domain_name: Default
      project_domain_name: Default
    region_name: {region}
  lab-appcred:
    auth_type: v3applicationcredential
    auth:
      auth_url: {keystone}
      application_credential_id: {credential}
      application_credential_secret: {password}
    region_name: {region}
  lab-restricted:
    auth_type: v3applicationcredential
    auth:
      auth_url: {keystone}
      application_credential_id: {restricted}
      application_credential_secret: {password}
    region_name: {region}
  lab-trust:
    auth:
      auth_url: {keystone}
      username: trustee
      password: {password}
      user_domain_name: Default
      trust_id: {trust[0]}
    region_name: {region}""")
