package manila

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// rewrite changes the clouds.yaml of a cloud.
func (c *cloud) rewrite(oldNew ...string) {
	c.t.Helper()
	text, err := os.ReadFile(c.file)
	if err == nil {
		err = os.WriteFile(c.file, []byte(strings.NewReplacer(oldNew...).Replace(string(text))), 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// TestCannotOpen: who cannot use a cloud is told what is missing, when he starts.
func TestCannotOpen(t *testing.T) {
	for name, test := range map[string]struct {
		fault fakemanila.Fault
		file  []string // what is written otherwise
		want  error
		says  string
	}{
		"a region that is not there": {file: []string{"RegionOne", "RegionTwo"}, want: backend.ErrInvalid, says: `no service of type sharev2 in region "RegionTwo"`},
		"no project":                 {file: []string{"project_name: csi, ", "", ", project_domain_name: Default", ""}, want: backend.ErrInvalid, says: "not of one project"},
		"another cloud":              {file: []string{"fake:", "other:"}, want: backend.ErrInvalid, says: `cloud "fake"`},
		"no role": {fault: fakemanila.Fault{Path: "/types", Status: 403, Text: `{"forbidden": {"code": 403, "message": "Policy doesn't allow share_type:index to be performed."}}`},
			want: backend.ErrAuth, says: "may this user use Manila? "},
		"a rule that is missing": {fault: fakemanila.Fault{Path: "/types", Status: 401, Times: 2}, want: backend.ErrAuth, says: "may this user use Manila? "},
		"another service":        {fault: fakemanila.Fault{Method: "GET", Status: 200, Text: `{"versions": [{"version": "3.0"}]}`}, want: backend.ErrInvalid, says: "lists no version 2"},
		"Keystone's 503":         {fault: fakemanila.Fault{Path: "/v3", Status: 503, Times: 100}, want: backend.ErrUnavailable, says: "sign in at"},
		"no such Keystone":       {fault: fakemanila.Fault{Path: "/v3", Status: 404}, want: backend.ErrInvalid, says: "/v3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, fakemanila.Options{})
			c.rewrite(test.file...)
			if test.fault.Path != "" || test.fault.Method != "" {
				c.Add(test.fault)
			}
			_, err := Open(t.Context(), c.options())
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), fakemanila.Password) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %v with %q", err, test.want, test.says)
			}
		})
	}
}

// TestTrust: a trustee makes a share in the project of who trusts him, also when the
// token has ended.
func TestTrust(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	o := c.options()
	o.Cloud = "trust"
	b := ok[*Backend](t)(Open(t.Context(), o))
	c.ExpireTokens()
	ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
}

// TestTLS: a cloud with a CA of its own, which wants to see a certificate.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	issue := func(name string) (cert, key string) {
		private := ok[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
			IsCA: ca == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
		if ca == nil {
			ca, caKey = template, private
		}
		der, err := x509.CreateCertificate(rand.Reader, template, ca, &private.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return write(name+".pem", "CERTIFICATE", der), write(name+".key", "EC PRIVATE KEY", ok[[]byte](t)(x509.MarshalECPrivateKey(private)))
	}
	caFile, _ := issue("ca")
	server := ok[tls.Certificate](t)(tls.LoadX509KeyPair(issue("server")))
	clientCert, clientKey := issue("client")
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ok[[]byte](t)(os.ReadFile(caFile)))
	c := newCloud(t, fakemanila.Options{TLS: &tls.Config{Certificates: []tls.Certificate{server}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}})
	for _, test := range []struct {
		with map[string]string
		says string // empty: it is let in
	}{
		{map[string]string{}, "certificate signed by unknown authority"},
		{map[string]string{"cacert": caFile}, "certificate required"},
		{map[string]string{"cacert": caFile, "cert": clientCert, "key": clientKey}, ""},
		{map[string]string{"cacert": filepath.Join(dir, "none.pem")}, "none.pem"},
	} {
		var file struct {
			Clouds map[string]map[string]any `json:"clouds"`
		}
		if err := yaml.Unmarshal([]byte(c.Clouds()), &file); err != nil {
			t.Fatal(err)
		}
		for k, v := range test.with {
			file.Clouds["fake"][k] = v
		}
		if err := os.WriteFile(c.file, ok[[]byte](t)(yaml.Marshal(file)), 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := Open(t.Context(), c.options())
		switch {
		case test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)):
			t.Errorf("with %v: %v", test.with, err)
		case test.says == "" && err != nil:
			t.Errorf("with %v: %v", test.with, err)
		case test.says == "":
			ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
		}
	}
}
