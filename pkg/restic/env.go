package restic

import (
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/abaca-csi/abaca/pkg/nearest"
)

// kind says how the value of a variable is treated.
type kind int

const (
	plain  kind = iota
	secret      // removed from every text
	files       // paths, separated by commas; relative ones are below the folder
	inline      // <NAME>_FILE: the path of a file that holds <NAME>
)

// known are the variables of a repository folder: those of restic's manual
// ("Scripting", "Environment variables") that say where a repository is and how
// to enter it, and the proxies of Go's net/http.
var known = map[string]kind{
	"RESTIC_REPOSITORY": plain, "RESTIC_REPOSITORY_FILE": inline,
	"RESTIC_PASSWORD": secret, "RESTIC_PASSWORD_FILE": inline,
	"RESTIC_KEY_HINT": plain, "RESTIC_CACERT": files, "RESTIC_TLS_CLIENT_CERT": files,
	"RESTIC_COMPRESSION": plain, "RESTIC_PACK_SIZE": plain, "RESTIC_READ_CONCURRENCY": plain,

	"AWS_ACCESS_KEY_ID": secret, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": secret, "AWS_DEFAULT_REGION": plain,
	"RESTIC_AWS_ASSUME_ROLE_ARN": plain, "RESTIC_AWS_ASSUME_ROLE_SESSION_NAME": plain,
	"RESTIC_AWS_ASSUME_ROLE_EXTERNAL_ID": secret, "RESTIC_AWS_ASSUME_ROLE_POLICY": plain,
	"RESTIC_AWS_ASSUME_ROLE_REGION": plain, "RESTIC_AWS_ASSUME_ROLE_STS_ENDPOINT": plain,

	"AZURE_ACCOUNT_NAME": plain, "AZURE_ACCOUNT_KEY": secret, "AZURE_ACCOUNT_SAS": secret, "AZURE_ENDPOINT_SUFFIX": plain,

	"B2_ACCOUNT_ID": secret, "B2_ACCOUNT_KEY": secret,

	"GOOGLE_PROJECT_ID": plain, "GOOGLE_APPLICATION_CREDENTIALS": files, "GOOGLE_ACCESS_TOKEN": secret,

	"OS_AUTH_URL": plain, "OS_REGION_NAME": plain, "OS_USERNAME": plain, "OS_USER_ID": plain, "OS_PASSWORD": secret,
	"OS_TENANT_ID": plain, "OS_TENANT_NAME": plain, "OS_USER_DOMAIN_NAME": plain, "OS_USER_DOMAIN_ID": plain,
	"OS_PROJECT_NAME": plain, "OS_PROJECT_DOMAIN_NAME": plain, "OS_PROJECT_DOMAIN_ID": plain, "OS_TRUST_ID": plain,
	"OS_APPLICATION_CREDENTIAL_ID": plain, "OS_APPLICATION_CREDENTIAL_NAME": plain, "OS_APPLICATION_CREDENTIAL_SECRET": secret,
	"OS_STORAGE_URL": plain, "OS_AUTH_TOKEN": secret, "ST_AUTH": plain, "ST_USER": plain, "ST_KEY": secret,

	"RESTIC_REST_USERNAME": plain, "RESTIC_REST_PASSWORD": secret,

	"HTTP_PROXY": plain, "HTTPS_PROXY": plain, "NO_PROXY": plain,
}

// refused are variables that restic knows and a repository must not set, by
// prefix, with the reason. Who may write a repository's Secret must not gain a
// program of their choice in a mover, which runs as root.
var refused = []struct{ prefix, reason string }{
	{"RESTIC_PASSWORD_COMMAND", "it would run a program; give RESTIC_PASSWORD"},
	{"RESTIC_FROM_", "a repository has no second one"},
	{"RESTIC_HOST", "each backup has a host of its own"},
	{"RESTIC_CACHE_DIR", "the cache is the mover's"},
	{"RESTIC_FEATURES", "Abaca chooses the features of restic"},
	{"RESTIC_PROGRESS_FPS", "Abaca needs restic's progress"},
	// minio-go runs the file's credential_process.
	{"AWS_SHARED_CREDENTIALS_FILE", "it could run a program; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"},
	{"AWS_PROFILE", "there is no shared credentials file; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"},
	{"AZURE_FORCE_CLI_CREDENTIAL", "it would run a program; give AZURE_ACCOUNT_KEY or AZURE_ACCOUNT_SAS"},
	{"RCLONE_", "rclone repositories would run a program"},
	{"PATH", "programs are the mover's"},
	{"LD_", "programs are the mover's"},
	{"HOME", "directories are the mover's"},
	{"TMP", "directories are the mover's"},
	{"XDG_", "directories are the mover's"},
}

// schemes are restic's kinds of repositories, less rclone.
var schemes = []string{"local", "s3", "rest", "sftp", "azure", "gs", "b2", "swift"}

// LoadEnv reads a repository folder, such as a mounted Secret: one file for
// each restic environment variable, named after it. One trailing newline is
// removed; names that begin with a dot are skipped (Kubernetes' ..data).
//
// It is strict: what is unknown, refused or missing is ErrConfig with the name
// and what to do, never with a value. A file that a variable refers to may lie
// in the folder; RESTIC_REPOSITORY_FILE and RESTIC_PASSWORD_FILE are replaced
// by the variables they stand for.
func LoadEnv(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: read repository folder: %w", ErrConfig, err)
	}
	env, others := map[string]string{}, map[string]bool{}
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasPrefix(name, ".") {
			continue
		}
		if _, ok := known[name]; !ok {
			others[name] = true
			continue
		}
		if env[name], err = readValue(filepath.Join(dir, name)); err != nil {
			return nil, fmt.Errorf("%w: read %s: %w", ErrConfig, name, err)
		}
	}
	for name, value := range env {
		if known[name] != files && known[name] != inline {
			continue
		}
		paths := strings.Split(value, ",")
		for i, path := range paths {
			if filepath.IsAbs(path) {
				continue
			}
			if !filepath.IsLocal(path) {
				return nil, fmt.Errorf("%w: %s must name files in the repository folder, or absolute paths", ErrConfig, name)
			}
			delete(others, filepath.Clean(path))
			paths[i] = filepath.Join(dir, path)
		}
		env[name] = strings.Join(paths, ",")
		if known[name] == inline {
			plainName := strings.TrimSuffix(name, "_FILE")
			if _, ok := env[plainName]; ok {
				return nil, fmt.Errorf("%w: both %s and %s are set", ErrConfig, plainName, name)
			}
			if value, err = readValue(env[name]); err != nil {
				return nil, fmt.Errorf("%w: read the file of %s: %w", ErrConfig, name, err)
			}
			delete(env, name)
			env[plainName] = strings.TrimSpace(value) // as restic does
		}
	}
	for name := range others {
		env[name] = "" // for checkEnv to say what is wrong with it
	}
	return env, checkEnv(env)
}

// readValue reads one value. A Secret holds 1 MiB at most.
func readValue(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	return strings.TrimSuffix(string(data), "\n"), err
}

// checkEnv returns ErrConfig unless env can be a repository's environment.
func checkEnv(env map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(env)) {
		for _, r := range refused {
			if strings.HasPrefix(name, r.prefix) {
				return fmt.Errorf("%w: %s cannot be set: %s", ErrConfig, name, r.reason)
			}
		}
		k, ok := known[name]
		if !ok {
			return fmt.Errorf("%w: unknown variable %q%s", ErrConfig, name, nearest.Hint(name, slices.Collect(maps.Keys(known))))
		}
		if k == inline {
			return fmt.Errorf("%w: %s can only be in a repository folder", ErrConfig, name)
		}
		if strings.ContainsRune(env[name], 0) {
			return fmt.Errorf("%w: the value of %s holds a NUL byte", ErrConfig, name)
		}
	}
	for _, name := range []string{"RESTIC_REPOSITORY", "RESTIC_PASSWORD"} {
		if env[name] == "" {
			return fmt.Errorf("%w: %s is missing or empty; it is a key of the repository's Secret, or a file in its folder", ErrConfig, name)
		}
	}
	return checkLocation(env["RESTIC_REPOSITORY"])
}

// checkLocation returns ErrConfig unless restic will understand the location
// of a repository in the way we do.
func checkLocation(location string) error {
	scheme, rest, ok := strings.Cut(location, ":")
	if strings.HasPrefix(location, "/") || !ok {
		scheme, rest = "local", location
	}
	switch {
	case strings.ContainsAny(location, "\r\n"):
		return fmt.Errorf("%w: RESTIC_REPOSITORY holds a line break", ErrConfig)
	case !slices.Contains(schemes, scheme):
		return fmt.Errorf("%w: RESTIC_REPOSITORY must be an absolute path, or a location of one of the kinds %s", ErrConfig, strings.Join(schemes, ", "))
	case scheme == "local" && !filepath.IsAbs(rest):
		// A mover's working directory is the volume.
		return fmt.Errorf("%w: RESTIC_REPOSITORY must be an absolute path if it is a directory", ErrConfig)
	case scheme == "sftp" && regexp.MustCompile(`(^|[/@])-`).MatchString(strings.SplitN(strings.TrimPrefix(rest, "//"), "/", 2)[0]):
		// ssh would take such a host or user for an option, and run a ProxyCommand.
		return fmt.Errorf("%w: RESTIC_REPOSITORY has a host or user that begins with a dash", ErrConfig)
	}
	return nil
}

// foreign are the kinds of repositories that whoever does not run restic may name:
// over the network, and with credentials of their own, one of each list. Without
// them the libraries of restic look for those of the machine that it runs on, and
// would lend them out.
var foreign = map[string][][]string{
	"s3":    {{"AWS_ACCESS_KEY_ID"}, {"AWS_SECRET_ACCESS_KEY"}},
	"b2":    {{"B2_ACCOUNT_ID"}, {"B2_ACCOUNT_KEY"}},
	"azure": {{"AZURE_ACCOUNT_KEY", "AZURE_ACCOUNT_SAS"}},
	"gs":    {{"GOOGLE_ACCESS_TOKEN"}},
	"rest":  nil,
	"swift": nil,
}

// ForeignEnv returns the environment of a repository that is set up by somebody who
// must gain nothing else by it: data are names of variables and their values, as a
// Secret holds them, read as [LoadEnv] reads a folder. ErrConfig for what LoadEnv
// refuses, for a variable that is the path of a file or a proxy, for a repository that
// is no network server, and for one without credentials.
func ForeignEnv(data map[string][]byte) (map[string]string, error) {
	env := map[string]string{}
	for name, value := range data {
		env[name] = strings.TrimSuffix(string(value), "\n")
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		switch k := known[name]; {
		case k == files, k == inline:
			return nil, fmt.Errorf("%w: %s cannot be set here: it names a file, and there is none", ErrConfig, name)
		case strings.HasSuffix(name, "_PROXY"):
			return nil, fmt.Errorf("%w: %s cannot be set here: the way to the server is not the repository's choice", ErrConfig, name)
		}
	}
	if err := checkEnv(env); err != nil {
		return nil, err
	}
	scheme, rest, _ := strings.Cut(env["RESTIC_REPOSITORY"], ":")
	needs, ok := foreign[scheme]
	if !ok || strings.HasPrefix(scheme, "/") {
		return nil, fmt.Errorf("%w: RESTIC_REPOSITORY must be of one of the kinds %s here", ErrConfig,
			strings.Join(slices.Sorted(maps.Keys(foreign)), ", "))
	}
	// restic's REST client knows sockets of the machine too ("rest:http+unix:").
	if scheme == "rest" && !strings.HasPrefix(rest, "http://") && !strings.HasPrefix(rest, "https://") {
		return nil, fmt.Errorf("%w: RESTIC_REPOSITORY must be rest:http:// or rest:https:// and so on", ErrConfig)
	}
	for _, either := range needs {
		if !slices.ContainsFunc(either, func(name string) bool { return env[name] != "" }) {
			return nil, fmt.Errorf("%w: %s is missing or empty, which a repository of kind %s needs here",
				ErrConfig, strings.Join(either, " or "), scheme)
		}
	}
	return env, nil
}

var userinfo = regexp.MustCompile(`//([^/?#\s]*)@`)

// newRedactor returns what removes the secrets of env from a text: the values
// as they are, as a URL holds them, and as a quoted string holds them.
func newRedactor(env map[string]string) *strings.Replacer {
	var secrets []string
	add := func(s string) {
		quoted := strconv.Quote(s)
		query := url.QueryEscape(s)
		secrets = append(secrets, s, query, strings.ReplaceAll(query, "+", "%20"), url.PathEscape(s),
			url.UserPassword("", s).String()[1:], quoted[1:len(quoted)-1])
	}
	for name, value := range env {
		if known[name] == secret {
			add(value)
			for line := range strings.Lines(value) { // texts are cut into lines
				add(strings.TrimSpace(line))
			}
		}
		for _, match := range userinfo.FindAllStringSubmatch(value, -1) {
			user, password, ok := strings.Cut(match[1], ":")
			if !ok && strings.HasPrefix(value, "sftp:") {
				continue // a login name; there is no way to give a password
			}
			if !ok {
				password = user // a token
			}
			add(match[1])
			add(password)
			if decoded, err := url.PathUnescape(password); err == nil {
				add(decoded)
			}
		}
	}
	slices.Sort(secrets)
	secrets = slices.DeleteFunc(slices.Compact(secrets), func(s string) bool { return s == "" })
	// One secret may begin with another: the replacer takes the first that fits.
	slices.SortStableFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	pairs := make([]string, 0, 2*len(secrets))
	for _, s := range secrets {
		pairs = append(pairs, s, "***")
	}
	return strings.NewReplacer(pairs...)
}
