package fakemanila

// route is one call of the API, since a minor version.
type route struct {
	method, pattern string
	since           int
	do              func(*call) answer
}

var routes = []route{
	{"POST", "shares", 0, (*call).createShare},
	{"GET", "shares", 0, (*call).listShares},
	{"GET", "shares/detail", 0, (*call).listShares},
	{"GET", "shares/*", 0, (*call).getShare},
	{"DELETE", "shares/*", 0, (*call).deleteShare},
	{"GET", "shares/*/export_locations", 9, (*call).shareLocations},
	{"POST", "shares/*/action", 7, (*call).shareAction},
	{"GET", "shares/*/metadata", 0, (*call).getMetadata},
	{"POST", "shares/*/metadata", 0, (*call).setMetadata},
	{"PUT", "shares/*/metadata", 0, (*call).setMetadata},
	{"DELETE", "shares/*/metadata/*", 0, (*call).deleteMetadata},
	{"GET", "share-access-rules", 45, (*call).listRules},
	{"GET", "share-access-rules/*", 45, (*call).getRule},
	{"PUT", "share-access-rules/*", 88, (*call).updateRule},
	{"POST", "snapshots", 0, (*call).createSnapshot},
	{"GET", "snapshots", 0, (*call).listSnapshots},
	{"GET", "snapshots/detail", 0, (*call).listSnapshots},
	{"GET", "snapshots/*", 0, (*call).getSnapshot},
	{"PUT", "snapshots/*", 0, (*call).updateSnapshot},
	{"DELETE", "snapshots/*", 0, (*call).deleteSnapshot},
	{"POST", "snapshots/*/metadata", 73, (*call).setMetadata},
	{"PUT", "snapshots/*/metadata", 73, (*call).setMetadata},
	{"DELETE", "snapshots/*/metadata/*", 73, (*call).deleteMetadata},
	{"GET", "snapshots/*/access-list", 32, (*call).listSnapshotRules},
	{"POST", "snapshots/*/action", 32, (*call).snapshotAction},
	{"GET", "snapshots/*/export-locations", 32, (*call).snapshotLocations},
	{"GET", "snapshot-instances", 19, (*call).listInstances},
	{"GET", "types", 0, (*call).listTypes},
	{"GET", "messages", 37, (*call).listMessages},
	{"GET", "quota-sets/*/detail", 25, (*call).quota},
	{"GET", "availability-zones", 7, (*call).zones},
	{"GET", "resource-locks", 81, (*call).listLocks},
}
