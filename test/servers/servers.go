// Package servers runs the servers that restic keeps repositories on, on this
// machine's loopback: a REST server (restic/rest-server) and one that speaks S3
// (versitygw). Their programs are made by `make bin/servers`.
package servers

import (
	"crypto/sha1"
	"encoding/base64"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// A Server keeps what it is given in a directory. It can be stopped and started
// again, and ends with its test.
type Server struct {
	// Env is what the folder of a repository on it holds, but for the password:
	// restic's environment variables.
	Env map[string]string
	// Flags are more of the program's flags, from the next Start on.
	Flags []string

	t       testing.TB
	dir     string
	address string
	args    []string
	cmd     *exec.Cmd
	log     string // a file
}

// who is let in.
const user, password = "abaca", "an-access-key-of-tests"

// REST starts a rest-server, with one repository at its top.
func REST(t testing.TB, bin, dir string) *Server {
	t.Helper()
	s := prepare(t, dir)
	sum := sha1.Sum([]byte(password)) // a form of htpasswd
	users := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(users, []byte(user+":{SHA}"+base64.StdEncoding.EncodeToString(sum[:])+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.args = []string{filepath.Join(bin, "rest-server"), "--listen", s.address, "--htpasswd-file", users, "--path", dir}
	s.Env = map[string]string{"RESTIC_REPOSITORY": "rest:http://" + s.address + "/",
		"RESTIC_REST_USERNAME": user, "RESTIC_REST_PASSWORD": password}
	s.Start()
	return s
}

// S3 starts a versitygw; the repository is in the bucket "backups".
func S3(t testing.TB, bin, dir string) *Server {
	t.Helper()
	s := prepare(t, dir)
	s.args = []string{filepath.Join(bin, "versitygw"), "--port", s.address, "--access", user, "--secret", password, "--quiet", "posix", dir}
	s.Env = map[string]string{"RESTIC_REPOSITORY": "s3:http://" + s.address + "/backups",
		"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": password, "AWS_DEFAULT_REGION": "us-east-1"}
	s.Start()
	return s
}

func prepare(t testing.TB, dir string) *Server {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The port is free now, and nobody else on a machine of tests wants this one.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &Server{t: t, dir: dir, address: l.Addr().String(), log: filepath.Join(t.TempDir(), "log")}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("log of the server:\n%s", s.said())
		}
	})
	return s
}

// Start starts a server that does not run, and waits until it listens.
func (s *Server) Start() {
	s.t.Helper()
	s.cmd = exec.Command(s.args[0], append(s.Flags, s.args[1:]...)...)
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("%v: run `make bin/servers`", err)
	}
	for range 200 {
		if conn, err := net.Dial("tcp", s.address); err == nil {
			conn.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("%s does not listen:\n%s", s.args[0], s.said())
}

// said is what the server has printed.
func (s *Server) said() string {
	text, _ := os.ReadFile(s.log)
	return string(text)
}

// Stop kills the server, with all connections, if it runs.
func (s *Server) Stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// Folder writes the folder of a repository on the server.
func (s *Server) Folder(dir, password string) {
	s.t.Helper()
	err := os.MkdirAll(dir, 0o755)
	for name, value := range s.Env {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o600)
		}
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "RESTIC_PASSWORD"), []byte(password+"\n"), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}
