// Package servers runs the servers that restic keeps repositories on, on this
// machine: a REST server (restic/rest-server) and one that speaks S3 (versitygw).
// Their programs are made by `make bin/servers`.
package servers

import (
	"crypto/sha1"
	"encoding/base64"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Place is where servers listen.
type Place struct {
	Address string // an IP address
	Network string // the file of a network namespace; "" is that of the tests
}

// Loopback is what the programs of this machine reach.
var Loopback = Place{Address: "127.0.0.1"}

// Listen listens there, on a port that is free.
func (p Place) Listen() (l net.Listener, err error) {
	return l, p.inside(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(p.Address, "0"))
		return err
	})
}

// inside does something in the network of the place.
func (p Place) inside(do func() error) error {
	if p.Network == "" {
		return do()
	}
	// The thread must not end, as one would whose goroutine does not unlock it: it may
	// have started servers, which would be killed (PR_SET_PDEATHSIG).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	there, err := os.Open(p.Network)
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	err = do()
	if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
		panic(err) // all that follows would be in the wrong network
	}
	return err
}

// A Server keeps what it is given in a directory. It can be stopped and started
// again, and ends with its test.
type Server struct {
	// Env is what the folder of a repository on it holds, but for the password:
	// restic's environment variables.
	Env map[string]string
	// Flags are more of the program's flags, from the next Start on.
	Flags []string

	t       testing.TB
	place   Place
	address string   // with the port
	bin     string   // the directory of the programs
	args    []string // the program, and its arguments
	cmd     *exec.Cmd
	log     string // a file
}

// who is let in.
const user, password = "abaca", "an-access-key-of-tests"

// REST starts a rest-server, with one repository at its top. With users, each has
// one of that name there, which no other may enter; the password is "of-" and the
// name, and Env has the top alone.
func (p Place) REST(t testing.TB, bin, dir string, users ...string) *Server {
	t.Helper()
	s := p.prepare(t, bin, dir)
	s.Env = map[string]string{"RESTIC_REPOSITORY": "rest:http://" + s.address + "/"}
	passwords, more := map[string]string{}, []string{"--private-repos"}
	for _, u := range users {
		passwords[u] = "of-" + u
	}
	if len(users) == 0 {
		passwords[user], more = password, nil
		s.Env["RESTIC_REST_USERNAME"], s.Env["RESTIC_REST_PASSWORD"] = user, password
	}
	text := ""
	for u, secret := range passwords {
		sum := sha1.Sum([]byte(secret)) // a form of htpasswd
		text += u + ":{SHA}" + base64.StdEncoding.EncodeToString(sum[:]) + "\n"
	}
	htpasswd := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(htpasswd, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.args = append([]string{"rest-server", "--listen", s.address, "--htpasswd-file", htpasswd, "--path", dir}, more...)
	s.Start()
	return s
}

// S3 starts a versitygw; the repository is in the bucket "backups".
func (p Place) S3(t testing.TB, bin, dir string) *Server {
	t.Helper()
	s := p.prepare(t, bin, dir)
	s.args = []string{"versitygw", "--port", s.address, "--access", user, "--secret", password, "--quiet", "posix", dir}
	s.Env = map[string]string{"RESTIC_REPOSITORY": "s3:http://" + s.address + "/backups",
		"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": password, "AWS_DEFAULT_REGION": "us-east-1"}
	s.Start()
	return s
}

func (p Place) prepare(t testing.TB, bin, dir string) *Server {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The port is free now, and nobody else on a machine of tests wants this one.
	l, err := p.Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &Server{t: t, place: p, address: l.Addr().String(), bin: bin, log: filepath.Join(t.TempDir(), "log")}
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
	args := append([]string{filepath.Join(s.bin, s.args[0])}, append(s.Flags, s.args[1:]...)...)
	if s.place.Network != "" {
		args = append([]string{"nsenter", "--net=" + s.place.Network, "--"}, args...) // becomes the program
	}
	s.cmd = exec.Command(args[0], args[1:]...)
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
		if s.place.inside(func() error {
			conn, err := net.Dial("tcp", s.address)
			if err == nil {
				conn.Close()
			}
			return err
		}) == nil {
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
