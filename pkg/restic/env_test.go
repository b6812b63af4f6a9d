package restic

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLoadEnv(t *testing.T) {
	base := map[string]string{"RESTIC_REPOSITORY": "/srv/repo\n", "RESTIC_PASSWORD": "pass\n\n"}
	with := func(pairs ...string) map[string]string {
		files := map[string]string{}
		for k, v := range base {
			files[k] = v
		}
		for i := 0; i < len(pairs); i += 2 {
			files[pairs[i]] = pairs[i+1]
			if pairs[i+1] == "-" {
				delete(files, pairs[i])
			}
		}
		return files
	}
	for name, test := range map[string]struct {
		files map[string]string
		want  map[string]string // DIR is the folder
		err   string            // or what the error holds
	}{
		"one newline is removed": {files: base, want: map[string]string{"RESTIC_REPOSITORY": "/srv/repo", "RESTIC_PASSWORD": "pass\n"}},
		"files in the folder": {
			files: with("RESTIC_REPOSITORY", "-", "RESTIC_REPOSITORY_FILE", "where", "where", "s3:https://s3/b\n",
				"RESTIC_PASSWORD", "-", "RESTIC_PASSWORD_FILE", "pw", "pw", " pass \n",
				"GOOGLE_APPLICATION_CREDENTIALS", "key.json", "key.json", "{}", "RESTIC_CACERT", "a.pem,/etc/b.pem", "a.pem", ""),
			want: map[string]string{
				"RESTIC_REPOSITORY": "s3:https://s3/b", "RESTIC_PASSWORD": "pass",
				"GOOGLE_APPLICATION_CREDENTIALS": "DIR/key.json", "RESTIC_CACERT": "DIR/a.pem,/etc/b.pem",
			},
		},
		"typing error":     {files: with("RESTIC_PASWORD", "geheim"), err: `unknown variable "RESTIC_PASWORD" (did you mean "RESTIC_PASSWORD"?)`},
		"lower case":       {files: with("aws_access_key_id", "x"), err: "AWS_ACCESS_KEY_ID"},
		"password command": {files: with("RESTIC_PASSWORD_COMMAND", "rm -rf /"), err: "run a program"},
		"host":             {files: with("RESTIC_HOST", "h"), err: "RESTIC_HOST cannot be set"},
		"second":           {files: with("RESTIC_FROM_PASSWORD", "h"), err: "RESTIC_FROM_PASSWORD cannot be set"},
		"path":             {files: with("PATH", "/tmp"), err: "PATH cannot be set"},
		"preload":          {files: with("LD_PRELOAD", "/tmp/x.so"), err: "LD_PRELOAD cannot be set"},
		"aws process":      {files: with("AWS_SHARED_CREDENTIALS_FILE", "c", "c", "[default]"), err: "could run a program"},
		"no password":      {files: with("RESTIC_PASSWORD", "-"), err: "RESTIC_PASSWORD is missing"},
		"empty password":   {files: with("RESTIC_PASSWORD", "\n"), err: "RESTIC_PASSWORD is missing"},
		"no repository":    {files: with("RESTIC_REPOSITORY", "-"), err: "RESTIC_REPOSITORY is missing"},
		"both":             {files: with("RESTIC_PASSWORD_FILE", "pw", "pw", "x"), err: "both RESTIC_PASSWORD and"},
		"no such file":     {files: with("RESTIC_PASSWORD", "-", "RESTIC_PASSWORD_FILE", "pw"), err: "read the file of RESTIC_PASSWORD_FILE"},
		"outside":          {files: with("RESTIC_CACERT", "../../etc/shadow"), err: "RESTIC_CACERT must name files in"},
		"NUL":              {files: with("RESTIC_PASSWORD", "a\x00b"), err: "NUL"},
		"relative":         {files: with("RESTIC_REPOSITORY", "srv/repo"), err: "absolute path"},
		"relative local":   {files: with("RESTIC_REPOSITORY", "local:repo"), err: "absolute path"},
		"rclone":           {files: with("RESTIC_REPOSITORY", "rclone:x:y"), err: "must be an absolute path, or"},
		"ssh option":       {files: with("RESTIC_REPOSITORY", "sftp:-oProxyCommand=sh:/x"), err: "dash"},
		"ssh option, url":  {files: with("RESTIC_REPOSITORY", "sftp://-oProxyCommand=sh/x"), err: "dash"},
		"ssh option, user": {files: with("RESTIC_REPOSITORY", "sftp:-lroot@host:/x"), err: "dash"},
		"ssh":              {files: with("RESTIC_REPOSITORY", "sftp:a-b@c-d:/-x"), want: map[string]string{"RESTIC_REPOSITORY": "sftp:a-b@c-d:/-x", "RESTIC_PASSWORD": "pass\n"}},
		"two lines":        {files: with("RESTIC_REPOSITORY", "/srv\n/repo"), err: "line break"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, test.files)
			env, err := LoadEnv(dir)
			if test.err != "" {
				if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want ErrConfig with %q", err, test.err)
				}
				for _, value := range test.files {
					if len(value) > 2 && value != "pass\n\n" && strings.Contains(strings.ReplaceAll(err.Error(), "RESTIC_PASSWORD", ""), strings.TrimSpace(value)) {
						t.Errorf("error %q holds the value %q", err, value)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for k, v := range env {
				env[k] = strings.ReplaceAll(v, dir, "DIR")
			}
			if diff := cmp.Diff(test.want, env); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// A mounted Secret is a directory of symbolic links by way of ..data.
func TestLoadEnvSecretVolume(t *testing.T) {
	dir := t.TempDir()
	versioned := filepath.Join(dir, "..2026_11_24")
	if err := os.Mkdir(versioned, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, versioned, map[string]string{"RESTIC_REPOSITORY": "/r", "RESTIC_PASSWORD": "p"})
	for link, target := range map[string]string{"..data": "..2026_11_24", "RESTIC_REPOSITORY": "..data/RESTIC_REPOSITORY", "RESTIC_PASSWORD": "..data/RESTIC_PASSWORD"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	env, err := LoadEnv(dir)
	if diff := cmp.Diff(map[string]string{"RESTIC_REPOSITORY": "/r", "RESTIC_PASSWORD": "p"}, env); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	if err := os.Mkdir(filepath.Join(dir, "AWS_SESSION_TOKEN"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadEnv(dir); !errors.Is(err, ErrConfig) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := LoadEnv(filepath.Join(dir, "missing")); !errors.Is(err, ErrConfig) {
		t.Errorf("no folder: %v", err)
	}
}

// TestForeignEnv: who may only name a repository gains no program, no file, no proxy
// and no credentials of the machine that restic runs on.
func TestForeignEnv(t *testing.T) {
	s3 := []string{"RESTIC_REPOSITORY=s3:https://s3.example.org/b", "RESTIC_PASSWORD=horse", "AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b"}
	at := func(location string, more ...string) []string {
		return append([]string{"RESTIC_REPOSITORY=" + location, "RESTIC_PASSWORD=horse"}, more...)
	}
	for name, test := range map[string]struct {
		env []string
		err string // what the error holds; empty for none
	}{
		"s3":                     {env: s3},
		"a region and a token":   {env: append(at("s3:s3.example.org/b", "AWS_DEFAULT_REGION=eu", "AWS_SESSION_TOKEN=t"), s3[2:]...)},
		"rest":                   {env: at("rest:https://me:secret@rest.example.org/me/")},
		"rest in the clear":      {env: at("rest:http://rest.example.org/", "RESTIC_REST_USERNAME=u", "RESTIC_REST_PASSWORD=p")},
		"azure":                  {env: at("azure:container:/", "AZURE_ACCOUNT_NAME=n", "AZURE_ACCOUNT_SAS=s")},
		"b2":                     {env: at("b2:bucket:path", "B2_ACCOUNT_ID=i", "B2_ACCOUNT_KEY=k")},
		"gs":                     {env: at("gs:bucket:/", "GOOGLE_ACCESS_TOKEN=t")},
		"swift":                  {env: at("swift:container:/", "OS_AUTH_URL=https://keystone.example.org", "OS_PASSWORD=p")},
		"a directory":            {at("/etc"), "RESTIC_REPOSITORY must be of one of the kinds azure, b2, gs, rest, s3, swift here"},
		"a directory, local:":    {at("local:/etc"), "of one of the kinds"},
		"a directory with colon": {at("/rest:/x"), "of one of the kinds"},
		"sftp":                   {at("sftp:host:/dir"), "of one of the kinds"},
		"rclone":                 {at("rclone:remote:dir"), "RESTIC_REPOSITORY must be"},
		"a socket":               {at("rest:http+unix:///csi/csi.sock:/x/"), "rest:http:// or rest:https://"},
		"no scheme of rest":      {at("rest:example.org/x"), "rest:http:// or rest:https://"},
		"the machine's s3 role":  {at("s3:https://s3.example.org/b"), "AWS_ACCESS_KEY_ID is missing"},
		"half a key":             {at("s3:https://s3.example.org/b", "AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY="), "AWS_SECRET_ACCESS_KEY is missing"},
		"the machine's azure":    {at("azure:c:/", "AZURE_ACCOUNT_NAME=n"), "AZURE_ACCOUNT_KEY or AZURE_ACCOUNT_SAS"},
		"the machine's google":   {at("gs:b:/"), "GOOGLE_ACCESS_TOKEN"},
		"no b2 key":              {at("b2:b"), "B2_ACCOUNT_ID"},
		"google's file":          {at("gs:b:/", "GOOGLE_APPLICATION_CREDENTIALS=/etc/x"), "GOOGLE_APPLICATION_CREDENTIALS cannot be set here"},
		"a certificate's file":   {append(s3, "RESTIC_CACERT=/etc/shadow"), "RESTIC_CACERT cannot be set here"},
		"a client's key":         {append(s3, "RESTIC_TLS_CLIENT_CERT=/etc/x"), "RESTIC_TLS_CLIENT_CERT cannot"},
		"the location's file":    {append(s3, "RESTIC_REPOSITORY_FILE=/etc/x"), "RESTIC_REPOSITORY_FILE cannot"},
		"the password's file":    {append(s3, "RESTIC_PASSWORD_FILE=/etc/shadow"), "RESTIC_PASSWORD_FILE cannot"},
		"a proxy":                {append(s3, "HTTPS_PROXY=http://169.254.169.254"), "HTTPS_PROXY cannot"},
		"no proxy":               {append(s3, "NO_PROXY=*"), "NO_PROXY cannot"},
		"a program":              {append(s3, "RESTIC_PASSWORD_COMMAND=id"), "would run a program"},
		"a second repository":    {append(s3, "RESTIC_FROM_REPOSITORY=/x"), "RESTIC_FROM_REPOSITORY cannot"},
		"a cache":                {append(s3, "RESTIC_CACHE_DIR=/x"), "RESTIC_CACHE_DIR cannot"},
		"a temporary directory":  {append(s3, "TMPDIR=/x"), "TMPDIR cannot"},
		"shared credentials":     {append(s3, "AWS_SHARED_CREDENTIALS_FILE=/x"), "could run a program"},
		"aws's configuration":    {append(s3, "AWS_CONFIG_FILE=/x"), "unknown variable"},
		"a library":              {append(s3, "LD_PRELOAD=/x"), "LD_PRELOAD cannot"},
		"debugging":              {append(s3, "GODEBUG=x"), "unknown variable"},
		"no password":            {s3[:1], "RESTIC_PASSWORD is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			data := map[string][]byte{}
			want := map[string]string{}
			for _, e := range test.env {
				k, v, _ := strings.Cut(e, "=")
				data[k], want[k] = []byte(v+"\n"), v
			}
			got, err := ForeignEnv(data)
			if test.err != "" {
				if err == nil || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.err) {
					t.Errorf("%v, want %q", err, test.err)
				}
				return
			}
			if err != nil || cmp.Diff(want, got) != "" {
				t.Errorf("%v\n%s", err, cmp.Diff(want, got))
			}
		})
	}
}
